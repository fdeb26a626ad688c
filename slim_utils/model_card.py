"""The model card of a pruned checkpoint, made from its run."""

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from transformers import PreTrainedConfig

from slim_utils.families import EXPORTED_FAMILIES, FAMILIES, SERVED_FAMILIES, layer_shapes
from slim_utils.pruning_record import LayerMask
from slim_utils.text_source import HUB_SOURCES

CARD_FILE = "README.md"
CARRIED_KEYS = ("license", "license_name", "license_link", "language")

logger = logging.getLogger(__name__)


def vllm_options(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Arguments of ``vllm.LLM`` that serve a small model of this configuration; ``None`` for families not tested there.

    vLLM's own Qwen2 knows no other heads than those that fill the hidden size, but its LLaMA has Qwen2's biases too.
    """
    if FAMILIES[config.model_type].base_type not in SERVED_FAMILIES:
        return None
    if config.model_type not in SERVED_FAMILIES:
        return {"model_impl": "transformers", "trust_remote_code": True}
    shape = layer_shapes(config)[0]
    if config.model_type == "qwen2" and shape.num_heads * shape.head_dim != config.hidden_size:
        return {"hf_overrides": {"architectures": ["LlamaForCausalLM"], "qkv_bias": True}}
    return {}


def base_card_data(model_path: str) -> dict[str, Any]:
    """What carries over of the base model's own card, from its folder or the hub; empty where there is none."""
    path = Path(model_path) / CARD_FILE
    try:
        if not Path(model_path).is_dir():
            path = Path(hf_hub_download(model_path, CARD_FILE))
        data = ModelCard.load(path).data.to_dict()
    except Exception as error:
        logger.info("no card of %s is carried over (%s)", model_path, type(error).__name__)
        return {}
    return {key: data[key] for key in CARRIED_KEYS if key in data}


def copy_license_files(model_path: str, folder: Path) -> None:
    """Copy the licence and notice files of a base model's folder beside the weights made from it."""
    for path in sorted(Path(model_path).glob("*")):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            shutil.copyfile(path, folder / path.name)


def model_card(record: dict[str, Any], config: PreTrainedConfig, masks: list[LayerMask]) -> str:
    """Text of the card.

    Args:
        record: content of ``run.json``; without ``perplexity`` the card says that none was measured.
        config: of the small model.
        masks: what each layer keeps.
    """
    arguments = record["arguments"]
    base, is_local = arguments["model_path"], Path(arguments["model_path"]).is_dir()
    base_data = record["base_card"]
    source = HUB_SOURCES.get(arguments["dataset"], {}).get("path", "")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimgpt", "pruned", "structured-pruning"],
        base_model=None if is_local else base,
        datasets=[source] if "/" in source else None,
        **base_data,
    )
    name = Path(base).resolve().name if is_local else base
    license_name = base_data.get("license_name") or base_data.get("license")
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name.rsplit('/', 1)[-1]}, pruned\n",
        f"{name} without {100 * record['sizes']['block_share_removed']:.1f} % of the weights of its decoder layers: "
        "attention heads and FFN columns removed by [SlimGPT](https://arxiv.org/abs/2412.18110), layer by layer, "
        "the weights that stay updated to make up for them; no training.\n",
        "## Sizes\n",
        _sizes(record["sizes"], masks),
        "## Method\n",
        _method(record),
        "## Perplexity\n",
        _perplexities(record.get("perplexity")),
        "## Use\n",
        _usage(arguments["push_to_hub"] or "DIR", config),
        "## Licence\n",
        f"That of the base model: {license_name}.\n" if license_name else "That of the base model, whatever it is.\n",
    ]
    return "\n".join(sections)


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _sizes(sizes: dict[str, Any], masks: list[LayerMask]) -> str:
    counts = (f"{sizes['parameters_dense']:,}", f"{sizes['parameters_pruned']:,}")
    total = _table(("", "base", "pruned"), [("parameters", *counts)])
    rows = []
    for index, mask in enumerate(masks):
        shape = mask.shape
        heads = f"{len(mask.kept_heads)} of {shape.num_heads}"
        groups = f"{len(mask.kept_kv_heads)} of {shape.num_kv_heads}"
        columns = f"{mask.kept_width} of {shape.ffn_width}"
        experts = f" (each of {shape.num_experts} experts)" if shape.num_experts else ""
        rows.append((index, heads, groups, columns + experts))
    return f"{total}\n{_table(('layer', 'heads', 'key/value heads', 'FFN columns'), rows)}"


def _method(record: dict[str, Any]) -> str:
    arguments, calibration = record["arguments"], record["calibration"]
    samples = f"{calibration['num_samples']} × {calibration['seqlen']} tokens, seed {record['seed']}"
    ratio = f"{arguments['sparsity']:g}"
    if arguments["non_uniform"]:
        strategy = arguments["non_uniform_strategy"]
        ratio = f"{arguments['min_sparsity']:g} to {arguments['max_sparsity']:g} ({strategy})"
    if arguments["target_ratio"]:
        ratio = f"{arguments['target_ratio']:g} of the block weights ({_allocation(arguments)})"
    elif arguments["target_params"]:
        ratio = f"down to {arguments['target_params']:,.0f} parameters ({_allocation(arguments)})"
    elif arguments["profile"]:
        ratio = f"those of {Path(arguments['profile']).name}"
    rows = [
        ("pruning ratio", ratio),
        ("compensation", "no" if arguments["no_compensate"] else "yes"),
        ("unit in grouped-query attention", arguments["gqa_unit"]),
        ("score of heads", "exact error" if arguments["exact_heads"] else "grouped Cholesky"),
        ("FFN columns of a step", arguments["column_group"] or "dynamic group size"),
        ("beginnings of text besides the samples", arguments["text_starts"] or 0),
        ("damping", f"{arguments['percdamp']:g}"),
        ("calibration text", Path(calibration["source"]).name),
        ("calibration samples", samples),
        ("their fingerprint (sha256)", calibration["samples_sha256"]),
        ("versions", ", ".join(f"{package} {version}" for package, version in record["versions"].items())),
    ]
    return _table(("", ""), rows)


def _allocation(arguments: dict[str, Any]) -> str:
    rounds = arguments["refine"]
    return f"{arguments['allocation'] or 'uniform'}{f', refined {rounds} ×' if rounds else ''}"


def _perplexities(perplexities: list[dict[str, Any]] | None) -> str:
    if not perplexities:
        return "Not measured.\n"
    rows = [(entry["dataset"], entry["seqlen"], f"{entry['perplexity']:.2f}") for entry in perplexities]
    return _table(("text", "tokens of a window", "perplexity"), rows)


def _usage(model: str, config: PreTrainedConfig) -> str:
    base_type = FAMILIES[config.model_type].base_type
    stock = base_type == config.model_type
    remote = "" if stock else ", trust_remote_code=True"
    parts = [
        "Transformers"
        + (":\n" if stock else " (5.15 or newer; the code in this folder builds each layer in its own shape):\n"),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}"{remote})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model}"{remote})\n```\n',
    ]
    if not stock and _loses_kv_heads(config):
        parts.append(
            "Some layers have fewer key/value heads than the base: the library's paged continuous batching "
            "(`generate_batch`) and peft's prefix tuning fail on them; `generate` and LoRA work.\n"
        )
    options = vllm_options(config)
    if options is not None:
        parts.append(f"vLLM:\n\n```bash\nvllm serve {model}{_vllm_flags(options)}\n```\n")
    if base_type in EXPORTED_FAMILIES:
        parts.append(
            "llama.cpp, by a script of the suite that made this model:\n\n"
            f"```bash\npython scripts/export_gguf.py {model} pruned.gguf\n```\n"
        )
    return "\n".join(parts)


def _loses_kv_heads(config: PreTrainedConfig) -> bool:
    """Whether a layer has fewer key/value heads than the configuration says at its top level."""
    whole = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return any(shape.num_kv_heads != whole for shape in layer_shapes(config))


def _vllm_flags(options: dict[str, Any]) -> str:
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(value if isinstance(value, str) else shlex.quote(json.dumps(value)))
    return "".join(f" {word}" for word in words)
