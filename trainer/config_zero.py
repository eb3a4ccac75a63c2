"""The part of the configuration that is DeepSpeed's (`parallel.backend: zero`)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stepline.models.config import Section


class ZeroConfig(Section):
    """What DeepSpeed ZeRO (arXiv 1910.02054) cuts among the ranks."""

    stage: Literal[1, 2, 3] = 3
    """1: the optimizer's state; 2: gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Into host memory: the optimizer's state, master weights and the update; all: weights too (stage 3)."""


STEPLINES = {
    "train_batch_size": "budget.batch_tokens",
    "train_micro_batch_size_per_gpu": "parallel.micro_batch",
    "gradient_accumulation_steps": "budget.batch_tokens and parallel.micro_batch",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision.compute",
    "communication_data_type": "precision.reduce",
    "gradient_allreduce_op": "budget.batch_tokens",
    "prescale_gradients": "precision.reduce",
    "gradient_predivide_factor": "precision.reduce",
    "activation_checkpointing": "run.recompute",
    "stage": "parallel.zero.stage",
    "offload_optimizer": "parallel.zero.offload",
    "offload_param": "parallel.zero.offload",
    "cpu_offload": "parallel.zero.offload",
    "stage3_max_reuse_distance": "parallel.reshard_after_forward",
    "wandb": "logging.wandb",
    "steps_per_print": "logging.every",
    "checkpoint": "checkpoint.every",
    "compile": "run.compile",
}
"""DeepSpeed's keys that Stepline sets, and by which of its own."""


class DeepSpeedConfig(Section):
    """Keys of DeepSpeed's `zero_optimization` that are passed through as they are; null: DeepSpeed's default."""

    zero_quantized_weights: bool | None = None
    """ZeRO++ (arXiv 2306.10209), stage 3 on GPUs: weights travel in int8."""
    zero_quantized_gradients: bool | None = None
    """ZeRO++, stage 3 on GPUs: gradients travel in int4 between nodes."""
    zero_hpz_partition_size: int | None = Field(None, ge=1)
    """ZeRO++, stage 3: ranks, of a node, that keep a second copy of the weights for backward."""
    reduce_bucket_size: int | None = Field(None, ge=1)
    """Elements of a gradient reduction."""
    allgather_bucket_size: int | None = Field(None, ge=2)
    """Stages 1 and 2: elements of a gathering of the updated weights."""
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0)
    """Stage 3: elements that are gathered ahead of their use."""
    stage3_param_persistence_threshold: int | None = Field(None, ge=0)
    """Stage 3: weights with fewer elements stay gathered."""
    stage3_max_live_parameters: int | None = Field(None, ge=0)
    """Stage 3: elements that are gathered at once."""
    sub_group_size: int | None = Field(None, ge=1)
    """Stage 3: elements that are updated at once."""
    overlap_comm: bool | None = None
    """Reduce gradients beside the rest of backward."""
    contiguous_gradients: bool | None = None
    """Copy gradients into one buffer before they are reduced."""
    reduce_scatter: bool | None = None
    """Reduce each gradient to the rank that keeps it, not to all."""
    allgather_partitions: bool | None = None
    """DeepSpeed takes it; 0.19 does nothing by it."""
    log_trace_cache_warnings: bool | None = None
    """Stage 3: say when modules run in another order than before."""

    @model_validator(mode="before")
    @classmethod
    def _ours(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key in STEPLINES and key not in cls.model_fields:
                raise ValueError(f"DeepSpeed's {key} is set by Stepline: use {STEPLINES[key]} instead")
            if key == "zero_optimization":
                raise ValueError("the keys of zero_optimization stand here directly; leave that level out")
        return given

    def given(self) -> dict[str, Any]:
        """The keys that are set."""
        return self.model_dump(exclude_none=True)
