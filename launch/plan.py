"""Plans a training before paying for it: compiles its step for devices that are not there.

python launch/plan.py --config configs/ti2t/llava_dpo.py --model llava-1.5-7b --topology v5p:2x2x2
python launch/plan.py --config configs/ti2t/llava_ppo.py --model llava-1.5-7b --topology h200:8 \\
    --search --out plans.json
python launch/plan.py --config configs/ti2t/llava_dpo.py --model llava-1.5-7b --topology v5e:4x4 \\
    --show sharding --workdir runs/plan
"""

import json
from pathlib import Path

from absl import flags

from aa_jax import config
from aa_jax.plan import targets

config.define_flags()
flags.DEFINE_string(
    "model", None, "Model: a known name, a checkpoint folder or config.json; default: model.path."
)
flags.DEFINE_string("topology", "cpu:8", "Devices, e.g. v5e:4x4, v5p:4x4x4, v6e:2x4, h200:8.")
flags.DEFINE_integer("rows", None, "Examples per update; default: the config's.")
flags.DEFINE_list("micro", None, "Rows per device and micro-batch to try; accumulation fills up.")
flags.DEFINE_list("remat", None, "Recomputation policies to try: none, dots, full.")
flags.DEFINE_boolean("search", False, "Try larger micro-batches and less recomputation.")
flags.DEFINE_integer("length", None, "Tokens per row; default: the config's limit.")
flags.DEFINE_integer("response", None, "Slots per response; default: a quarter of the length.")
flags.DEFINE_integer("patches", 1024, "Patches per image, for models that read any size.")
flags.DEFINE_enum("show", None, ["sharding"], "Print where every array lies instead of compiling.")
flags.DEFINE_string("what", None, "Name of the row in --out; default: model and config.")
flags.DEFINE_string("out", None, "JSON file the figures are added to.")
flags.DEFINE_string("libtpu", None, "Path of a libtpu.so; default: build/libtpu, or installed.")
flags.DEFINE_string("cuda", None, "Folder of JAX's CUDA plugin; default: build/cuda, or installed.")
FLAGS = flags.FLAGS


def main(cfg, workdir):
    """Opens the topology, builds the step from shapes, and prints what compiling it says."""
    targets.prepare(FLAGS.topology, FLAGS.libtpu, FLAGS.cuda)
    from aa_jax.plan import command  # after preparing: importing it imports jax

    wishes = command.Wishes(
        model=FLAGS.model, topology=FLAGS.topology, rows=FLAGS.rows, search=FLAGS.search,
        micro=[int(n) for n in FLAGS.micro] if FLAGS.micro else None, remat=FLAGS.remat,
        length=FLAGS.length, response=FLAGS.response, patches=FLAGS.patches,
    )  # fmt: skip
    if FLAGS.show:
        print(command.show(cfg, wishes, workdir))
        return
    found = command.run(cfg, wishes, tell=lambda text: print(text, flush=True))
    what = FLAGS.what or f"{FLAGS.model or cfg.model.path}, {Path(FLAGS.config).stem}"
    if FLAGS.out:
        file = Path(FLAGS.out)
        kept = json.loads(file.read_text()) if file.exists() else []
        kept += [{"what": what, "figures": one.as_dict()} for one in found]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    config.run_main(main, complete=False)
