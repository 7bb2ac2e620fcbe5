"""The result of a run as files: adapter, new blocks or whole model; and best/ of an evaluation."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedModel

from checkpoints import adapter, trained_model
from checkpoints.training_state import describe_not_finite
from files.atomic_writes import write_text
from files.names import OPTIONS
from options.errors import UserError
from training.job import Job


def save_best(job: Job, model: PreTrainedModel, folder: Path) -> None:
    """Write the trained weights and the options into `folder`, which becomes best/. Collective.

    Raises UserError, on all ranks and before anything is written, if they hold NaN or infinity.
    """
    if error := describe_not_finite(model):
        raise UserError(error)
    save(job, model, folder, best=True)


def save(job: Job, model: PreTrainedModel, folder: Path, best: bool = False) -> None:
    """Write the adapter, the new blocks or the full model into `folder`. Collective; rank 0 raises OSError.

    Does not check that the weights are finite.

    Args:
        best: Write the run's options too, and of an expanded model only the new blocks: the other layers are
            gigabytes that do not change from step to step.
    """
    config, files, family, base = job.config, job.files, job.family, job.base
    llama_pro_save = "blocks" if best and config.method.expansion else config.llama_pro_save
    if llama_pro_save == "blocks":
        trained_model.save_blocks(model, family, folder, files, base, job.adapter_files)
    elif config.method.expansion:
        trained_model.save_expanded(model, family, folder, files, base, job.small_files)
    elif config.method.saves == "adapter":
        remark = adapter.save_adapter(model, folder, config, base, family, job.adapter_files)
        if remark and not best:
            print(remark, flush=True)
    else:
        trained_model.save_model(model, folder, files, base, job.small_files)
    if best and dist.get_rank() == 0:
        write_text(folder / OPTIONS, job.options_file(llama_pro_save=llama_pro_save))
