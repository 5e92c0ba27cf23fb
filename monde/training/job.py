"""A training run of a converted language model: steps, losses on disk, checkpoints, resume.

Nothing depends on what ran before a step except parameters and optimizer state: data follows from the step's number,
random numbers from seed, step and rank. So a run that was killed goes on with the same losses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monde.device.mesh import ExchangeFailed
from monde.device.notices import is_of_a_backend
from monde.routing.gates import Balance
from monde.training import checkpoint
from monde.training.auto import AutoSchedule
from monde.training.config import TrainConfig
from monde.training.convert import converted_experts
from monde.training.fabric import Fabric
from monde.training.gradients import GradientReducer, clip_gradients

LOSSES = "losses.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One step over all ranks. loss: mean over tokens, without the balancing loss. seconds_s: of this rank."""

    step: int
    loss: float
    balance: float
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    seconds_s: float


class TrainingJob:
    """batch_of(step): token ids [B, sequence + 1] of the whole batch, the same on all ranks; every rank takes its
    rows. model: converted, in float32 or bf16, with the same weights on all ranks. report: of what is planned, with
    parallel.chunks "auto". data_digest: of what batch_of draws from; a run goes on with the same alone.
    """

    def __init__(
        self,
        model: nn.Module,
        fabric: Fabric,
        config: TrainConfig,
        batch_of: Callable[[int], Tensor],
        folder: Path,
        report: Callable[[str], None] = lambda line: None,
        data_digest: str = "",
    ) -> None:
        self.model, self.fabric, self.config = model.train(), fabric, config
        self.batch_of, self.folder = batch_of, folder
        self.settings = config.identity()
        self.settings["data"]["digest"] = data_digest
        self.reducer = GradientReducer(model, fabric)
        self.auto = AutoSchedule(fabric, self.reducer, report) if config.parallel.chunks == "auto" else None
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.optimizer.learning_rate, betas=(0.9, 0.95),
            weight_decay=config.optimizer.weight_decay,
        )  # fmt: skip
        self.next_step = 0
        shared = [float(p.detach().double().sum()) for bucket in self.reducer.buckets for p in bucket.params]
        fabric.must_agree("the settings", self.settings)
        fabric.must_agree("the weights before training (sum)", sum(shared))

    def resume(self) -> int:
        """Continue from the newest whole checkpoint of the folder; the number of steps done.

        Errors: ValueError as checkpoint.load, or when the run was started with other settings.
        """
        found = checkpoint.complete(self.folder)
        self.fabric.must_agree("the newest checkpoint", str(found[-1]) if found else "none")
        if not found:
            return 0
        settings = self.fabric.all_do(lambda: checkpoint.read_run(found[-1])).settings
        for table, values in self.settings.items():
            for key, value in values.items():
                before = settings.get(table, {}).get(key)
                if key == "digest" and before not in (None, value):  # checkpoints of old have none
                    raise ValueError(
                        f"{found[-1]}: was trained on another text or with another tokenizer than data.text and "
                        "model.path have now; put them back, give another output.folder, or start over with --restart"
                    )
                if key != "digest" and before != value:
                    raise ValueError(
                        f"{found[-1]}: was trained with {table}.{key} = {before!r}, now {value!r}; "
                        "set it back, give another output.folder, or start over with --restart"
                    )
        run = checkpoint.load(found[-1], self.model, self.optimizer, self.fabric)
        self.next_step = run.step
        return run.step

    def run(self) -> Iterator[StepRecord]:
        """The steps that are left. Collective. Errors: RuntimeError when another rank is gone or late."""
        output = self.config.output
        self.fabric.first_does(self._open_losses)
        first = self.next_step
        while self.next_step < self.config.optimizer.steps:
            step = self.next_step
            with self._explaining(step):
                if self.auto is not None:
                    self.auto.before_step(step - first)
                record = self._step(step)
                if self.auto is not None:
                    self.auto.after_step()
            self.next_step += 1
            if self.fabric.is_first:
                with (self.folder / LOSSES).open("a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
            if self.next_step % output.checkpoint_every == 0 or self.next_step == self.config.optimizer.steps:
                with self._explaining(step):
                    self.save()
            yield record

    @contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        """What all ranks do together in or after this step."""
        try:
            with self.fabric.telling():
                yield
        except RuntimeError as error:
            raise self._explained(error, step) from error

    def save(self) -> Path:
        return checkpoint.save(
            self.folder, self.next_step, self.model, self.optimizer, self.fabric, self.settings,
            self.config.output.keep,
        )  # fmt: skip

    def _step(self, step: int) -> StepRecord:
        start_s = time.perf_counter()
        settings, fabric = self.config.optimizer, self.fabric
        rank = fabric.node_idx * fabric.num_local + fabric.local_idx
        torch.manual_seed((settings.seed * 1_000_003 + step) * 4099 + rank)
        ids_BS = self.batch_of(step)
        B, num_tokens = len(ids_BS), ids_BS[:, 1:].numel()
        mine_BS = ids_BS[rank * B // fabric.num_ranks : (rank + 1) * B // fabric.num_ranks].to(fabric.device)
        self.reducer.begin()
        loss, balance = self._losses(mine_BS, num_tokens)
        (loss + settings.aux_weight * balance).backward()
        self.reducer.finish()
        norm = clip_gradients(self.model, fabric, settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        self.optimizer.step()
        total, total_balance = fabric.sum_over_ranks(torch.stack((loss, balance)).detach().double()).tolist()
        if total != total:
            raise ValueError(f"step {step}: the loss is not a number; lower optimizer.learning_rate")
        seconds_s = time.perf_counter() - start_s
        return StepRecord(step, total, total_balance, norm, settings.rate_at(step), num_tokens, seconds_s)

    def _losses(self, ids_BS: Tensor, total_tokens: int) -> tuple[Tensor, Tensor]:
        """This rank's shares of both losses: they add up over ranks."""
        is_balanced = self.config.optimizer.aux_weight > 0
        out: Any = self.model(ids_BS[:, :-1], use_cache=False, output_router_logits=is_balanced)
        targets_T = ids_BS[:, 1:].flatten()
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), targets_T, reduction="sum") / total_tokens
        zero = loss.new_zeros(())
        return loss, (self._balance(out) if is_balanced else zero)

    def _balance(self, out: Any) -> Tensor:
        """Mean over layers of the balancing loss of the whole batch."""
        layers = converted_experts(self.model)
        logits = getattr(out, "router_logits", None) or ()
        if len(logits) != len(layers):
            raise ValueError(
                f"{type(self.model).__name__} gives router logits of {len(logits)} layers of {len(layers)}; "
                "set optimizer.aux_weight = 0"
            )
        shares = []
        for layer, logits_TE in zip(layers, logits, strict=True):
            assert layer.load is not None
            assigned_E = layer.load.assigned_E.to(logits_TE.device)
            prob_E = logits_TE.reshape(-1, logits_TE.shape[-1]).float().softmax(-1).sum(0)
            shares.append(Balance(assigned_E, prob_E).loss(assigned_E, layer.load.num_tokens))
        return torch.stack(shares).mean()

    def _open_losses(self) -> None:
        """Keep the lines of steps before next_step; a line cut short by a kill is dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_losses(self.folder / LOSSES) if r.step < self.next_step]
        partial = self.folder / f".{LOSSES}.partial"
        partial.write_text("".join(json.dumps(asdict(r)) + "\n" for r in kept))
        partial.rename(self.folder / LOSSES)

    def _explained(self, error: RuntimeError, step: int) -> RuntimeError:
        is_told = isinstance(error, ExchangeFailed)
        if self.fabric.num_ranks == 1 or not (is_told or is_of_a_backend(error)):
            return error
        found = checkpoint.complete(self.folder)
        resume = f"resumes after step {int(found[-1].name[5:])}" if found else "starts over"
        gone = f" (a rank is gone, or did not answer within {self.config.parallel.timeout_s:g} s)"
        return RuntimeError(
            f"rank {self.fabric.node_idx * self.fabric.num_local + self.fabric.local_idx}, step {step}: {error}"
            f"{'' if is_told else gone}; the same command {resume}"
        )


def read_losses(path: Path) -> list[StepRecord]:
    """What is whole of the file; nothing when there is none."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(StepRecord(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return records
