"""The same samples with TRL's GRPOTrainer: LoRA on the policy itself, no experts.

The only module that knows TRL.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from cluster.config import RunConfig, load
from cluster.run.models import model_path
from rewards.sources import build_tasks
from rewards.stream import PromptStream
from rollout.types import Prompt

LORA_RANK = 8


def reward_function(config: RunConfig, prompts: list[Prompt]) -> Any:
    """The run's own verifiers, called in the trainer's process."""
    verifiers = {name: task.verifier for name, task in build_tasks(config.data).items()}
    limit = config.rewards.binary_at

    def reward(completions: list[str], ordinal: list[int], **_: Any) -> list[float]:
        scores = [verifiers[prompts[o].task].score(c, prompts[o]) for c, o in zip(completions, ordinal, strict=True)]
        return scores if limit is None else [float(score >= limit) for score in scores]

    return reward


def trainer_settings(config: RunConfig, job: Job) -> dict[str, Any]:
    """The configuration in TRL's words.  What TRL does by default and what costs it time is switched off."""
    learner, sampling = config.learner, config.sampling
    return {
        "output_dir": str(Path(job.folder) / "trl"),
        "max_steps": job.warmup + job.steps,
        "per_device_train_batch_size": learner.groups * sampling.samples,
        "gradient_accumulation_steps": 1,
        "num_generations": sampling.samples,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "beta": config.algorithm.kl.coefficient,
        "loss_type": "grpo",
        "learning_rate": learner.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": learner.warmup_steps,
        "max_grad_norm": learner.clip,
        "weight_decay": learner.weight_decay,
        "seed": config.seed,
        "shuffle_dataset": False,
        "model_init_kwargs": {"dtype": config.policy.dtype},
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not config.policy.gpus,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def measure(job: Job) -> None:
    """Trains, and writes the answer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = load(job.config, list(job.overrides))
    stream = PromptStream(build_tasks(config.data), config.data)
    prompts = [stream.prompt(ordinal) for ordinal in range((job.warmup + job.steps) * config.learner.groups)]
    arrivals: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            arrivals.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            arrivals.append(time.perf_counter())
            control.should_training_stop = control.should_training_stop or job.out_of_time

    policy = model_path(config.policy.model)
    trainer = GRPOTrainer(
        model=policy,
        processing_class=AutoTokenizer.from_pretrained(policy),
        reward_funcs=reward_function(config, prompts),
        args=GRPOConfig(**trainer_settings(config, job)),
        train_dataset=Dataset.from_list([{"prompt": p.text, "ordinal": p.ordinal} for p in prompts]),
        peft_config=LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    steps = [{"step": end - start} for start, end in pairwise(arrivals)]
    job.finish(config.learner.groups * config.sampling.samples, steps)


if __name__ == "__main__":
    measure(Job.from_command_line())
