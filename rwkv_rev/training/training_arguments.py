"""The settings of a fine-tuning run as ``transformers.TrainingArguments``."""

from pathlib import Path

from transformers import TrainingArguments

from rwkv_rev.training.config import FinetuneConfig

_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def training_arguments(
    config: FinetuneConfig, output_dir: Path, *, device: str, dtype: str
) -> TrainingArguments:
    """The trainer's arguments for a run on ``device`` (``cpu`` or ``cuda``) in ``dtype``.

    Without a launcher one GPU is used, however many there are.
    """
    schedule = config.lr_schedule
    if schedule == "constant" and config.warmup:
        schedule = "constant_with_warmup"
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if schedule == "cosine_with_min_lr" else {},
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta2=0.99,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=device == "cpu",
        seed=config.seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        report_to=config.report_to,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device != "cpu",
        average_tokens_across_devices=True,
    )
    arguments.mixed_precision = _MIXED_PRECISION[dtype]  # whatever accelerate launch says
    if arguments.n_gpu > 1:  # the trainer would split batches by nn.DataParallel
        arguments._n_gpu = 1
    return arguments
