"""A program: ten training steps of a tiny model on meshes of a job, written down by process 0.

``python equality.py OUT.npz MEDIUM ALGORITHMS MESHES``, as in ``image dpo 'fsdp=8 data=2,seq=2'``;
a mesh ``one`` is a single device. For every algorithm and mesh: the losses and gradient norms of
all steps, the gradients of the first, and the parameters after the last.
"""

import sys

ROWS, BATCH, STEPS = 11, 6, 10
TEXT = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROTARY = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
CONFIGS = {
    "text": {**TEXT, "architectures": ["LlamaForCausalLM"]},
    "image": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 5,
        "text_config": TEXT,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
    },
    "video": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
        "text_config": {
            **TEXT,
            "hidden_size": 32,
            "model_type": "qwen2_vl_text",
            "rope_parameters": ROTARY,
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": 2,
            "num_heads": 2,
            "patch_size": 2,
            "embed_dim": 16,
            "mlp_ratio": 2,
            "hidden_size": 32,
        },
    },
    "audio": {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": 5,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_ffn_dim": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "max_source_positions": 24,
        },
    },
}


def media_of(medium, i, rng):
    """(features, fields of `Encoded`) of example i, which differ in size where they may."""
    import numpy as np

    if medium == "image":
        pixels = rng.normal(size=(1 + i % 2, 3, 8, 8)).astype(np.float32)
        return 4 * len(pixels), dict(
            images=len(pixels), image_size=(8, 8), media={"pixel_values": pixels}
        )
    if medium == "video":
        grid = np.array([[1 + i % 3, 4, 4 if i % 2 else 2]], np.int32)
        count = int(grid.prod())
        patches = rng.normal(size=(count, 24)).astype(np.float32)
        return count // 4, dict(
            images=1, patches=count, patch_numbers=24,
            media={"pixel_values": patches, "grid_thw": grid},
        )  # fmt: skip
    if medium == "audio":
        frames = 3 + 7 * (i % 6)
        media = {
            "input_features": rng.normal(size=(1, 8, 48)).astype(np.float32),
            "feature_lengths": np.array([frames], np.int32),
        }
        shapes = {name: x.shape for name, x in media.items()}
        features = ((frames - 1) // 2 + 1 - 2) // 2 + 1
        return features, dict(images=0, media=media, media_shapes=shapes)
    return 0, dict(images=0, media={})


def example(medium, i, samples=2, slots=6):
    """A prompt with its medium, responses of different lengths, and what the losses read."""
    import numpy as np

    from aa_jax.data.mrope import Grid, mrope_positions
    from aa_jax.data.tokens import Encoded

    rng = np.random.default_rng(i)
    features, fields = media_of(medium, i, rng)
    before, after = 2, 1 + i % 3
    prompt = rng.integers(9, 40, before + features + after).astype(np.int32)
    index = np.full(len(prompt), -1, np.int32)
    index[before : before + features] = np.arange(features)
    prompt[index >= 0] = 6 if medium == "video" else 5
    if medium == "video":
        grid = Grid(*fields["media"]["grid_thw"][0].tolist())
        fields["positions"], fields["next_position"] = mrope_positions(index, [grid], 2)
    lengths = [1 + (i + 2 * s) % slots for s in range(samples)]
    responses = tuple(rng.integers(9, 40, n).astype(np.int32) for n in lengths)
    per_token = (samples, slots)
    meta = {
        "ref_logps": rng.normal(-20, 2, samples),
        "old_logps": rng.normal(-3.7, 0.2, per_token),
        "ref_token_logps": rng.normal(-3.7, 0.2, per_token),
        "advantages": np.repeat(rng.normal(size=(samples, 1)), slots, axis=1),
        "returns": rng.normal(size=per_token),
        "old_values": rng.normal(size=per_token),
    }
    return Encoded(
        prompt=prompt, responses=responses, ended=(True,) * samples, feature_index=index,
        trained=np.zeros(len(prompt), bool), meta=meta, where=f"t:{i}", **fields,
    )  # fmt: skip


def algorithm(name, model, params):
    """(objective, parameters, axes, layout, extras)."""
    import jax

    from aa_jax import objectives
    from aa_jax.models import heads
    from aa_jax.rl import objectives as rl

    scored = {"model": params, "score_head": heads.init_score_head(model, jax.random.key(1))}
    if name == "dpo":
        return objectives.preference(model, beta=0.2), params, model.axes(), "preference", (
            "ref_logps",
        )  # fmt: skip
    if name == "reward":
        return objectives.reward(model), scored, heads.axes(model), "preference", ()
    on_policy = ("old_logps", "advantages")
    if name == "grpo":
        loss = rl.policy(model, loss="grpo", kl_coef=0.1)
        return loss, params, model.axes(), "group", (*on_policy, "ref_token_logps")
    both = {"policy": params, "critic": scored}
    axes = {"policy": model.axes(), "critic": heads.axes(model)}
    loss = rl.actor_critic(model, model)
    return loss, both, axes, "group", (*on_policy, "returns", "old_values")


def train(medium, name, mesh):
    """Ten steps; everything that must not depend on the mesh."""
    import functools

    import jax
    import numpy as np
    import optax

    from aa_jax import hosts, models
    from aa_jax.data.collate import collate, plan_shapes
    from aa_jax.data.loader import Loader
    from aa_jax.models.names import flatten
    from aa_jax.sharding import put_batch, shardings, share
    from aa_jax.training.state import init_state
    from aa_jax.training.step import make_step

    model = models.build(CONFIGS[medium])
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    loss, params, axes, layout, extras = algorithm(name, model, params)
    data = [example(medium, i) for i in range(ROWS)]
    shapes = plan_shapes(data, layout)
    if layout == "group":
        assert shapes.response_length == 6
    # The trace of decay 0 is the last gradient.
    tx = optax.chain(optax.trace(decay=0.0), optax.sgd(0.05, momentum=0.9))
    places = shardings(axes, params, mesh)
    step = make_step(loss, tx, mesh=mesh, accumulation=1)
    state = init_state(params, tx, mesh=mesh, shardings=places)
    own = share(mesh)
    loader = Loader(
        data, functools.partial(collate, shapes=shapes, layout=layout, extras=extras), BATCH,
        epochs=None, share=own, multiple_of=step.rows_multiple,
    )  # fmt: skip
    losses, norms, grads = [], [], {}
    batches = iter(loader)
    for number in range(STEPS):
        state, metrics = step(state, put_batch(next(batches), mesh, own))
        terms = metrics["loss"]
        terms = [terms] if hasattr(terms, "total") else terms
        losses.append(sum(float(term.mean) for term in terms))
        norms.append(float(metrics["grad_norm"].mean))
        if number == 0:
            grads = {k: hosts.to_host(x) for k, x in flatten(state["opt_state"][0].trace).items()}
    after = {k: hosts.to_host(x) for k, x in flatten(state["params"]).items()}
    out = {"loss": np.array(losses), "grad_norm": np.array(norms)}
    out |= {f"grad/{k}": x for k, x in grads.items()}
    return out | {f"param/{k}": x for k, x in after.items()}


def main():
    """Joins the job, trains every cell, writes."""
    from aa_jax import hosts, platforms

    platforms.start()
    import jax
    import numpy as np

    from aa_jax.sharding import make_mesh

    out, medium, names, meshes = sys.argv[1:]
    found = {}
    for name in names.split(","):
        for text in meshes.split():
            sizes = {} if text == "one" else dict(word.split("=") for word in text.split(","))
            devices = jax.devices()[:1] if text == "one" else None
            mesh = make_mesh(**{k: int(v) for k, v in sizes.items()}, devices=devices)
            for key, value in train(medium, name, mesh).items():
                found[f"{name}|{text}|{key}"] = value
            jax.clear_caches()
    if hosts.index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    from aa_jax import config

    config.run_main(main, argv=["equality"])
