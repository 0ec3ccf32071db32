"""Messages about a recipe's keys and values: each names the key, the value found and the values wanted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megatron_embed.bridge.errors import UsageError

#: name of a key in other programs → the key here
ALIASES: dict[str, str] = {
    name: key
    for key, names in {
        "optimizer.lr": "learning_rate max_lr peak_lr",
        "optimizer.min_lr": "min_learning_rate lr_min end_lr",
        "optimizer.warmup_iters": "warmup warmup_steps num_warmup_steps lr_warmup_iters warmup_ratio",
        "optimizer.lr_decay_style": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
        "optimizer.clip_grad": "max_grad_norm grad_clip gradient_clipping gradient_clip_val clip_grad_norm",
        "optimizer.weight_decay": "wd decay",
        "optimizer.distributed": "zero use_distributed_optimizer distributed_optimizer",
        "train.global_batch_size": "batch_size gbs train_batch_size per_device_train_batch_size batch",
        "train.micro_batch_size": "mbs per_device_batch_size mini_batch_size",
        "train.micro_batch_tokens": "max_tokens tokens_per_batch max_tokens_per_batch",
        "train.train_iters": "epochs epoch num_epochs num_train_epochs max_epochs max_steps steps num_steps iters "
        "max_iters iterations train_steps",
        "train.eval_interval": "eval_steps eval_every eval_iters val_check_interval",
        "train.save_interval": "save_steps save_every checkpoint_every ckpt_interval",
        "train.log_interval": "logging_steps log_every log_steps log_every_n_steps",
        "train.save_dir": "output_dir output out out_dir save checkpoint_dir run_dir",
        "train.seed": "random_seed data_seed",
        "model.hf_model": "model_name model_name_or_path model_path hf_model_path base_model pretrained_model",
        "model.tensor_model_parallel_size": "tp tp_size tensor_parallel tensor_parallel_size",
        "model.pipeline_model_parallel_size": "pp pp_size pipeline_parallel pipeline_parallel_size",
        "model.context_parallel_size": "cp cp_size context_parallel",
        "model.virtual_pipeline_model_parallel_size": "vpp vp vpp_size virtual_pipeline num_layers_per_virtual_stage",
        "model.sequence_parallel": "sp",
        "model.precision": "dtype torch_dtype bf16 fp16 fp32 mixed_precision",
        "model.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity",
        "model.pooling": "pool pooling_mode pooling_type",
        "model.normalize": "normalise normalization l2_normalize",
        "loss.temperature": "temp tau scale logit_scale",
        "loss.false_negative_margin": "margin",
        "loss.matryoshka_dims": "matryoshka mrl_dims dims",
        "data.train": "train_data train_file train_files train_path dataset dataset_name data_path train_dataset",
        "data.eval": "eval_data eval_file eval_dataset val_data validation_data",
        "data.query_prompt": "query_prefix query_instruction",
        "data.passage_prompt": "passage_prefix passage_instruction document_prompt doc_prompt",
        "data.query_max_length": "query_max_len max_query_length query_length",
        "data.passage_max_length": "passage_max_len max_passage_length passage_length max_length "
        "max_seq_length seq_length",
        "data.negatives_per_query": "negatives num_negatives hard_negatives num_hard_negatives train_group_size",
        "checkpoint.pretrained_checkpoint": "pretrained ckpt checkpoint_path megatron_path init_from",
        "checkpoint.load": "load_dir load_checkpoint",
        "checkpoint.resume": "resume_from_checkpoint auto_resume",
        "logger.wandb_project": "wandb project report_to",
        "logger.tensorboard": "tb tensorboard_dir",
    }.items()
    for name in names.split()
}


def refuse_unknown_keys(values: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    """Raise a :class:`UsageError` for a section or key that is not among ``known``, the dotted keys of a recipe."""
    sections = {key.partition(".")[0] for key in known if "." in key}
    for name, value in values.items():
        if name in sections:
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {name}: found {value!r}; wanted keys such as {_example(name, known)}")
            for inner in value:
                if f"{name}.{inner}" not in known:
                    raise UsageError(f"{where}: unknown key '{name}.{inner}'{suggest(f'{name}.{inner}', known)}")
        elif name not in known:
            raise UsageError(f"{where}: unknown key {str(name)!r}{suggest(str(name), known)}")


def _example(section: str, known: Iterable[str]) -> str:
    return ", ".join(sorted(key for key in known if key.startswith(f"{section}."))[:3])


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name nearest to ``name``, or None if none is near enough."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def suggest(key: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown key: the most likely key of ``known``, or the list of keys."""
    section, _, leaf = key.rpartition(".")
    if any(name.startswith(f"{key}.") for name in known):
        return f"; wanted one of its keys, such as {_example(key, known)}"
    # A right name in the wrong section, in no section, or from another program is a better guess than similar spelling.
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    if match := leaves.get(leaf) or ALIASES.get(leaf.lower().replace("-", "_")):
        return f"; did you mean {match!r}?"
    sections = sorted({name.partition(".")[0] for name in known if "." in name})
    if not section and (match := nearest(leaf, sections)):
        return f"; did you mean the section {match!r}?"
    own = {name.rpartition(".")[2]: name for name in known if name.startswith(f"{section}.")}
    if (match := nearest(leaf, own)) or (match := nearest(leaf, {**leaves, **ALIASES}, 0.7)):
        return f"; did you mean {own.get(match) or leaves.get(match) or ALIASES[match]!r}?"
    return f"; keys of {section}: {', '.join(own)}" if own else f"; known sections: {', '.join(sections)}"


def explain_validation_error(
    error: ValidationError, known: Sequence[str], of_a_source: Iterable[str], *, prefix: str = "", found: Any = None
) -> str:
    """Describe the first problem of a pydantic error in one line: key, value found, values wanted.

    Args:
        known: the dotted keys of a recipe.
        of_a_source: the keys of an entry of ``data.train``.
        prefix: the name of the section, if it was validated by itself.
        found: the value as the user typed it.
    """
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    key = ".".join(([prefix] if prefix else []) + place)
    if problem["type"] in ("extra_forbidden", "no_such_attribute") and not key.startswith("data.train."):
        return f"unknown key {key!r}{suggest(key, known)}"
    value = problem["input"] if found is None else found
    if problem["type"] == "model_type" and "." not in key:
        return f"{key}: found {value!r}; wanted keys such as {_example(key, known)}"
    source_keys = ", ".join(of_a_source)
    wanted = {
        "missing": f"keys {source_keys}, path at least",
        "extra_forbidden": f"keys {source_keys}",
        "model_type": f"a path or {{{source_keys}}}",
    }.get(problem["type"])
    if wanted is None:
        wanted = _WANTED.get(problem["type"], lambda context, message: message)(problem.get("ctx", {}), problem["msg"])
    return f"{key}: found {value!r}; wanted {wanted}"


_WANTED: dict[str, Any] = {
    "literal_error": lambda context, _: context["expected"].replace(" or ", ", ").replace("'", ""),
    "int_type": lambda *_: "a whole number",
    "int_from_float": lambda *_: "a whole number",
    "bool_type": lambda *_: "true or false",
    "string_type": lambda *_: "a text",
    "float_parsing": lambda *_: "a number",
    "float_type": lambda *_: "a number",
    "finite_number": lambda *_: "a finite number",
    "greater_than": lambda context, _: f"a number above {context['gt']:g}",
    "greater_than_equal": lambda context, _: f"a number from {context['ge']:g} up",
    "value_error": lambda context, _: str(context["error"]),
    "list_type": lambda *_: "a list, [a,b]",
}
