"""What other trainers call the keys of a run: `--learning_rate` is optim.lr here. Used in messages only. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from sharpmoe.invocation import CommandSpellings

# Name elsewhere (lower case, _ for -) -> our key, or a sentence that says what there is instead (it holds a space);
# {prepare} is that command as the user calls it.
ELSEWHERE: dict[str, str] = {
    # how much, how long
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "max_lr": "optim.lr",
    "min_lr": "optim.final_lr",
    "lr_end": "optim.final_lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps",
    "warmup": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps (a number of steps)",
    "batch_size": "train.global_batch (all ranks together)",
    "global_batch_size": "train.global_batch",
    "train_batch_size": "train.micro_batch (per rank) or train.global_batch (all ranks)",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "epochs": "train.steps (optimizer steps; an epoch is images / train.global_batch of them)",
    "num_epochs": "train.steps (optimizer steps; an epoch is images / train.global_batch of them)",
    "num_train_epochs": "train.steps (optimizer steps; an epoch is images / train.global_batch of them)",
    "max_epochs": "train.steps (optimizer steps; an epoch is images / train.global_batch of them)",
    "max_train_steps": "train.steps",
    "max_steps": "train.steps",
    "num_steps": "train.steps (optimizer steps), rollout.num_steps or sample.num_steps",
    "num_iterations": "train.steps",
    "total_steps": "train.steps",
    "iterations": "train.steps",
    "gradient_accumulation_steps": "train.micro_batch (accumulation is global_batch / (micro_batch x ranks))",
    "accumulate_grad_batches": "train.micro_batch (accumulation is global_batch / (micro_batch x ranks))",
    "grad_accum": "train.micro_batch (accumulation is global_batch / (micro_batch x ranks))",
    # precision and memory
    "mixed_precision": "train.precision (fp32 | bf16)",
    "bf16": "train.precision bf16",
    "fp16": "train.precision bf16 (fp16 is not offered)",
    "fp32": "train.precision fp32",
    "dtype": "train.precision (fp32 | bf16)",
    "amp": "train.precision (fp32 | bf16)",
    "gradient_checkpointing": "rollout.schedule checkpoint (or two_pass)",
    "activation_checkpointing": "rollout.schedule checkpoint (or two_pass)",
    "grad_checkpoint": "rollout.schedule checkpoint (or two_pass)",
    "zero_stage": "--deepspeed configs/zero2.json or configs/zero3.json",
    "offload": "the zero_optimization section of the DeepSpeed file (--deepspeed FILE)",
    "cpu_offload": "the zero_optimization section of the DeepSpeed file (--deepspeed FILE)",
    "compile": "train.compile ({sample} has --compile)",
    "torch_compile": "train.compile ({sample} has --compile)",
    "expert_parallel_size": "parallel.ep_size",
    "expert_parallel": "parallel.ep_size",
    "num_gpus": "the launcher decides: deepspeed --num_gpus N {train_script} ...",
    "num_processes": "the launcher decides: deepspeed --num_gpus N {train_script} ...",
    "nproc_per_node": "the launcher decides: torchrun --nproc_per_node N {train_script} ...",
    "world_size": "the launcher decides (torchrun --nproc_per_node N ...); {plan} has --world",
    "worlds": "the launcher decides (torchrun --nproc_per_node N ...); {plan} has --world",
    "cfg": "--config FILE",
    "config_file": "--config FILE",
    "ds_config": "--deepspeed FILE",
    "dry": "--dry-run (an option without a value)",
    "dryrun": "--dry-run (an option without a value)",
    # optimizer
    "optimizer": "optim (a section: name, lr, betas and others)",
    "adam_beta1": "optim.betas [BETA1, BETA2]",
    "adam_beta2": "optim.betas [BETA1, BETA2]",
    "beta1": "optim.betas [BETA1, BETA2]",
    "beta2": "optim.betas [BETA1, BETA2]",
    "adam_epsilon": "optim.eps",
    "adam_weight_decay": "optim.weight_decay",
    "wd": "optim.weight_decay",
    "muon_momentum": "optim.momentum",
    "use_8bit_adam": "optim.impl bitsandbytes",
    "max_grad_norm": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "clip_grad": "optim.clip_norm",
    "clip_grad_norm": "optim.clip_norm",
    "gradient_clip_val": "optim.clip_norm",
    "gradient_clipping": "optim.clip_norm",
    "ema": "optim.ema_decay (the average is always kept)",
    "use_ema": "optim.ema_decay (the average is always kept)",
    "ema_rate": "optim.ema_decay",
    # data
    "dataset": "data.shards (made by {prepare} --source FOLDER)",
    "dataset_name": "data.shards (made by {prepare} --source FOLDER)",
    "train_data_dir": "data.shards (made by {prepare} --source FOLDER)",
    "data_dir": "data.shards (made by {prepare} --source FOLDER)",
    "data_path": "data.shards (made by {prepare} --source FOLDER)",
    "instance_data_dir": "data.shards (made by {prepare} --source FOLDER)",
    "source": "data.shards (made by {prepare} --source FOLDER)",
    "caption_column": "{prepare} reads captions; data.shards names its folder",
    "resolution": "decided when shards are made: {prepare} --size; model.latent_size is that of the latents",
    "image_size": "decided when shards are made: {prepare} --size; model.latent_size is that of the latents",
    "center_crop": "decided when shards are made: {prepare}",
    "random_flip": "decided when shards are made: {prepare} --flip-pair",
    "vae": "decided when shards are made: {prepare} --codec",
    "text_encoder": "decided when shards are made: {prepare} --encoder",
    "dataloader_num_workers": "data.num_workers",
    "workers": "data.num_workers",
    "proportion_empty_prompts": "rollout.caption_dropout",
    "cfg_dropout": "rollout.caption_dropout",
    "class_dropout_prob": "rollout.caption_dropout",
    # weights, folders, logs
    "output_dir": "output (the folder of all runs) and name (the folder of this one)",
    "save_dir": "output (the folder of all runs) and name (the folder of this one)",
    "results_dir": "output (the folder of all runs) and name (the folder of this one)",
    "run_name": "name",
    "exp_name": "name",
    "experiment": "name",
    "resume_from_checkpoint": "checkpoint.resume",
    "resume_from": "checkpoint.resume",
    "load_from": "checkpoint.init (weights) or checkpoint.resume (the whole state)",
    "ckpt": "checkpoint.init (weights) or checkpoint.resume (the whole state)",
    "pretrained": "checkpoint.init",
    "pretrained_model_name_or_path": "checkpoint.init (a weights file; {convert} makes one)",
    "checkpointing_steps": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "ckpt_every": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "save_total_limit": "checkpoint.keep",
    "save_best": "checkpoint.keep_best",
    "load_best_model_at_end": "checkpoint.keep_best",
    "save_top_k": "checkpoint.keep_best (the best one, beside the latest)",
    "metric_for_best_model": "checkpoint.keep_best (held-out flow loss)",
    "logging_steps": "log.every",
    "log_every_n_steps": "log.every",
    "validation_steps": "log.validate_every",
    "eval_steps": "log.validate_every",
    "eval_every": "log.validate_every",
    "sample_steps": "log.sample_every",
    "validation_prompt": "sample.captions",
    "validation_prompts": "sample.captions",
    "prompts": "sample.captions",
    "guidance_scale": "sample.cfg_scale",
    "num_inference_steps": "sample.num_steps",
    "guidance_rescale": "sample.cfg_norm tokens (the norm of each token's conditional velocity)",
    "shift": "rollout.shift.factor (times that are trained) or sample.shift.factor (steps of sampling)",
    "flow_shift": "rollout.shift.factor (times that are trained) or sample.shift.factor (steps of sampling)",
    "discrete_flow_shift": "rollout.shift.factor (times that are trained) or sample.shift.factor (steps of sampling)",
    "timestep_shift": "rollout.shift.factor (times that are trained) or sample.shift.factor (steps of sampling)",
    "use_dynamic_shifting": "rollout.shift.factor tokens (training) or sample.shift.factor tokens (sampling)",
    "report_to": "log.trackers [tensorboard, ...] (log.jsonl is always written)",
    "logger": "log.trackers [tensorboard, ...] (log.jsonl is always written)",
    "log_with": "log.trackers [tensorboard, ...] (log.jsonl is always written)",
    "wandb": "log.trackers [tensorboard, wandb]",
    "use_wandb": "log.trackers [tensorboard, wandb]",
    "trackio": "log.trackers [tensorboard, trackio]",
    "mlflow": "log.trackers [tensorboard, mlflow]",
    "tensorboard": "log.trackers [tensorboard] (the default), to the folder of the run",
    "use_tensorboard": "log.trackers [tensorboard] (the default), to the folder of the run",
    "wandb_project": "log.project",
    "project_name": "log.project",
    "tracker_project_name": "log.project",
    "random_seed": "seed",
    "set_seed": "seed",
    # model
    "hidden_size": "model.width",
    "dim": "model.width",
    "num_layers": "model.depth",
    "num_attention_heads": "model.num_heads",
    "heads": "model.num_heads",
    "experts": "model.num_experts",
    "num_experts_per_tok": "model.top_k",
    "capacity_factor": "model.capacity",
    "aux_loss_weight": "loss.balance_weight",
    "aux_loss_coef": "loss.balance_weight",
    "model_type": "model.preset (tiny | s | b | l | xl)",
    # adapters
    "use_lora": "lora.rank (0: no adapters)",
    "use_peft": "lora.rank (0: no adapters)",
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_dim": "lora.rank",
    "network_dim": "lora.rank",
    "rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "network_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "lora_targets": "lora.targets",
    "target_modules": "lora.targets",
    "lora_layers": "lora.targets",
    "lora_modules": "lora.targets",
    "lora_dropout": "not offered: adapters have no dropout",
    "adapter": "lora.rank, lora.alpha and lora.targets",
    # what is trained
    "freeze": "train.frozen",
    "freeze_layers": "train.frozen",
    "freeze_layer": "train.frozen",
    "freeze_modules": "train.frozen",
    "frozen_modules": "train.frozen",
    "frozen_layers": "train.frozen",
    "frozen_parameters": "train.frozen",
    "freeze_experts": "train.frozen [moe.experts]",
    "freeze_backbone": "train.trainable (the parts that are trained)",
    "freeze_base": "train.trainable (the parts that are trained)",
    "trainable_modules": "train.trainable",
    "trainable_parameters": "train.trainable",
    "trainable_params": "train.trainable",
    "trainable_layers": "train.trainable",
    "modules_to_train": "train.trainable",
    "train_modules": "train.trainable",
    "unfreeze": "train.trainable",
    "unfreeze_layers": "train.trainable",
    "unfrozen_parameters": "train.trainable",
    "finetuning_type": "train.trainable (all parameters are trained where it is empty)",
    "train_router_only": "train.trainable [saliency_router, gate, capacity_predictor]",
    "router_only": "train.trainable [saliency_router, gate, capacity_predictor]",
    "train_experts_only": "train.trainable [moe.experts]",
    # what there is not
    "tensor_parallel": "not offered: experts are spread over ranks (parallel.ep_size), the rest is ZeRO's",
    "tensor_model_parallel_size": "not offered: experts are spread over ranks (parallel.ep_size), the rest is ZeRO's",
    "pipeline_parallel": "not offered: experts are spread over ranks (parallel.ep_size), the rest is ZeRO's",
    "pipeline_model_parallel_size": "not offered: experts are spread over ranks (parallel.ep_size), the rest is ZeRO's",
    "sequence_parallel": "not offered: an image is whole on its rank",
    "context_parallel_size": "not offered: an image is whole on its rank",
    "fp8": "not offered: train.precision is fp32 or bf16",
    "snr_gamma": "not offered: the loss weighs all times alike",
    "min_snr_gamma": "not offered: the loss weighs all times alike",
    "loss_weighting": "not offered: the loss weighs all times alike",
    "weighting_scheme": "not offered: the loss weighs all times alike; train.times says how pretraining draws them",
    "logit_mean": "not offered: logit-normal times have mean 0; rollout.shift moves them",
    "logit_std": "not offered: logit-normal times have standard deviation 1",
    "lr_num_cycles": "not offered: optim.schedule is constant or cosine",
    "lr_power": "not offered: optim.schedule is constant or cosine",
    "early_stopping": "not offered: checkpoint.keep_best keeps the best weights of a run that was too long",
    "early_stopping_patience": "not offered: checkpoint.keep_best keeps the best weights of a run that was too long",
}


_NEAR = 0.75  # likeness of a misspelt name, of 1: one letter in four


def suggestion(dotted: str, known: Iterable[str]) -> str:
    """Return what an unknown key may have meant, as the end of a message; "" where nothing is near.

    known: all dotted keys of a run. First come keys of the same section that hold its words (rollout.steps:
    rollout.num_steps), then what other trainers call a key, the same name in another section, a name that is nearly
    one of the section, and the nearest name of any.
    """
    keys, (section, _, leaf) = tuple(known), dotted.rpartition(".")
    word = leaf.lower().replace("-", "_")
    beside = {_leaf(key): key for key in keys if section and key.rpartition(".")[0] == section}
    same = [key for key in keys if _leaf(key) == word]
    longer = [key for name, key in beside.items() if {*word.split("_")} < {*name.split("_")}]
    if longer:
        return _did_you_mean([*longer, *same][:3])
    if word in ELSEWHERE:
        return f"; here it is: {_here(word)}"
    found = _closest(dotted, same, 0.0) or [beside[name] for name in _closest(word, beside)]
    if found:
        return _did_you_mean(found)
    names = {_leaf(key): key for key in reversed(keys)}
    for name in _closest(word, [*ELSEWHERE, *names], _NEAR):
        if name in ELSEWHERE:
            return f"{_did_you_mean([name])} here it is: {_here(name)}"
        return _did_you_mean([names[name]])
    return _did_you_mean(_closest(dotted, keys))


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _here(name: str) -> str:
    return ELSEWHERE[name].format_map(CommandSpellings())


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _closest(word: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the name that is most like `word`, or nothing where none is."""
    return difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)
