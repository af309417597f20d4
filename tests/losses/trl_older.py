"""Runs PPO of TRL 1.12.0 and BCO of TRL 1.13.0 on random numbers; stores what they give.

    pip install --no-deps --target DIR112 trl==1.12.0
    pip install --no-deps --target DIR113 trl==1.13.0
    TRL_PPO=DIR112 TRL_BCO=DIR113 python tests/losses/trl_older.py            # writes the file
    TRL_PPO=DIR112 TRL_BCO=DIR113 python tests/losses/trl_older.py --check    # compares with it

Later versions have neither. TRL's PPO is inline in one long method; its statements are taken from
the installed source between two of its comments and executed here.
"""

import argparse
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FILE = Path(__file__).parent / "goldens" / "trl_older.npz"
ROWS, SLOTS = 5, 7
PPO = {
    "default": {},
    "k3": {"kl_estimator": "k3"},
    "whiten": {"whiten_rewards": True, "gamma": 0.9, "lam": 0.8},
}


def between(source, first, last):
    """The lines from one that holds `first` through one that holds `last`."""
    lines = source.split("\n")
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def ppo():
    """Rewards, GAE, whitening, and both losses with their gradients."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    collect = between(source, "# 4. compute rewards", "advantages = torch.masked_fill")
    update = between(source, "vpred = torch.masked_fill", "loss = pg_loss + args.vf_coef")
    out = {}
    for name, options in PPO.items():
        rng = np.random.default_rng(3)
        tensor = lambda *shape, rng=rng: torch.tensor(rng.normal(size=shape)).float().double()  # noqa: E731
        args = SimpleNamespace(**(
            dict(kl_estimator="k1", kl_coef=0.05, whiten_rewards=False, gamma=1.0, lam=0.95,
                 cliprange=0.2, cliprange_value=0.2, vf_coef=0.1) | options
        ))  # fmt: skip
        ends = torch.tensor([SLOTS - 1, 2, 4, 0, SLOTS - 2])
        index = torch.arange(SLOTS).repeat(ROWS, 1)
        space = dict(vars(ppo_trainer)) | dict(
            args=args,
            sequence_lengths=ends,
            sequence_lengths_p1=ends + 1,
            padding_mask=index > ends[:, None],
            padding_mask_p1=index > (ends + 1)[:, None],
            logprobs=-tensor(ROWS, SLOTS).abs(),
            scores=tensor(ROWS),
            values=tensor(ROWS, SLOTS),
            responses=index,
            micro_batch_inds=torch.arange(ROWS),
        )
        space["ref_logprobs"] = space["logprobs"] + 0.3 * tensor(ROWS, SLOTS)
        for key in ("logprobs", "ref_logprobs"):
            space[key].masked_fill_(space["padding_mask"], 1.0)
        space["values"].masked_fill_(space["padding_mask_p1"], 0.0)
        exec(compile(collect, "collect", "exec"), space)
        new = (space["logprobs"] + 0.3 * tensor(ROWS, SLOTS)).requires_grad_()
        vpred = (space["values"] + 0.3 * tensor(ROWS, SLOTS)).requires_grad_()
        space |= dict(
            vpred=vpred,
            new_logprobs=new,
            mb_advantage=space["advantages"],
            mb_logprobs=space["logprobs"],
            mb_return=space["returns"],
            mb_values=space["values"],
        )
        exec(compile(update, "update", "exec"), space)
        slopes = torch.autograd.grad(space["loss"], (new, vpred))
        keep = dict(
            mask=~space["padding_mask"], mask_p1=~space["padding_mask_p1"], new=new, vpred=vpred,
            dnew=slopes[0], dvpred=slopes[1],
            **{key: space[key] for key in (
                "logprobs", "ref_logprobs", "scores", "values", "kl", "non_score_reward", "rewards",
                "advantages", "returns", "pg_loss", "vf_loss", "loss", "vf_clipfrac",
            )},
        )  # fmt: skip
        out |= {f"ppo/{name}/{key}": value.detach().double().numpy() for key, value in keep.items()}
    return out


def bco():
    """Three batches in a row, with the running shift."""
    import torch
    from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments

    accelerator = SimpleNamespace(use_distributed=False, device="cpu")
    running = RunningMoments(accelerator)
    trainer = SimpleNamespace(beta=0.3, running=running, match_underlying_distribution=False)
    rng = np.random.default_rng(5)
    out = {}
    for step, (good, bad) in enumerate([(4, 4), (2, 5), (3, 1)]):
        columns = [torch.tensor(rng.normal(-9, 2, n)).float().double() for n in (good, bad) * 2]
        leaves = [x.requires_grad_() for x in columns[:2]]
        losses, *_, delta = BCOTrainer.bco_loss(trainer, *leaves, *columns[2:], None, None)
        loss = losses.nanmean()
        keep = dict(
            zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), columns, strict=True)
        ) | dict(zip(("dchosen", "drejected"), torch.autograd.grad(loss, leaves), strict=True))
        keep |= {"loss": loss, "delta": delta}
        out |= {f"bco/{step}/{k}": v.detach().double().numpy() for k, v in keep.items()}
    return out


def elsewhere(part, folder):
    """Runs `part` in a process that imports TRL from `folder`."""
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, "--part", part], check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"},
    )  # fmt: skip
    return pickle.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--part", choices=("ppo", "bco"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part:
        sys.stdout.buffer.write(pickle.dumps({"ppo": ppo, "bco": bco}[flags.part]()))
        return 0
    fresh = elsewhere("ppo", os.environ["TRL_PPO"]) | elsewhere("bco", os.environ["TRL_BCO"])
    if not flags.check:
        np.savez_compressed(FILE, **fresh)
        return 0
    stored = np.load(FILE)
    assert sorted(stored.files) == sorted(fresh), set(stored.files) ^ set(fresh)
    for name, value in fresh.items():
        np.testing.assert_allclose(value, stored[name], rtol=1e-6, atol=1e-9, err_msg=name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
