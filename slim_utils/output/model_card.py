"""The card of a pruned or recovered model, made from the record of where it comes from."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig

from slim_utils.common.loading import load_config, model_on_meta, write_text_atomic
from slim_utils.families import EXPORTED_FAMILIES, FAMILIES, SERVED_FAMILIES, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.output.provenance import (
    CARD_FILE,
    RECOVERY,
    copy_license_files,
    prunings,
    total_share_removed,
    write_provenance,
)
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.profiling.tables import markdown_table


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


def model_card(
    provenance: dict[str, Any],
    config: PreTrainedConfig,
    parameters: int,
    masks: list[LayerMask] | None = None,
    perplexity: list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None = None,
    address: str = "DIR",
) -> str:
    """Text of the card of a pruned or recovered model.

    Args:
        provenance: of :func:`~slim_utils.output.provenance.read_provenance`, with the steps of this run.
        config: the model's.
        parameters: its size.
        masks: what each layer keeps, where that is not the shape of ``config``.
        perplexity: measured at the end of this run, or ``before`` and ``after`` it; ``None`` says that none was.
        address: what the commands call the model.
    """
    base, steps = provenance["base"], provenance["steps"]
    removals, trained = prunings(provenance), any(step["kind"] == RECOVERY for step in steps)
    tags = ["slimgpt", *(["pruned", "structured-pruning"] if removals else [])]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=base["name"] if base["on_hub"] else None,
        datasets=sorted({name for step in steps for name in step["datasets"]}) or None,
        **base["card"],
    )
    license_name = base["card"].get("license_name") or base["card"].get("license")
    done = " and ".join(word for word, so in (("pruned", removals), ("fine-tuned", trained)) if so)
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {base['name'].rsplit('/', 1)[-1]}, {done}\n",
        _summary(provenance, trained),
        "## Sizes\n",
        _sizes(base, parameters, "pruned" if removals else "this model", _kept(config, masks)),
        "## Method\n",
        _method(steps),
        "## Perplexity\n",
        _perplexities(perplexity),
        "## Use\n",
        _usage(address, config),
        "## Licence\n",
        f"That of the base model: {license_name}.\n" if license_name else "That of the base model, whatever it is.\n",
    ]
    return "\n".join(sections)


def write_card(folder: Path, provenance: dict[str, Any], model_path: str, **options: Any) -> None:
    """Write the record, the card and the licence files beside the weights in ``folder``.

    Args:
        folder: of a checkpoint.
        provenance: with the steps of this run.
        model_path: what the run started from, whose licence files are copied.
        options: of :func:`model_card`.
    """
    config = load_config(str(folder), trust_remote_code=False)
    parameters = count_parameters(model_on_meta(config))
    write_provenance(folder, provenance)
    copy_license_files(model_path, folder)
    write_text_atomic(folder / CARD_FILE, model_card(provenance, config, parameters, **options))


def _summary(provenance: dict[str, Any], trained: bool) -> str:
    name, removals = provenance["base"]["name"], prunings(provenance)
    training = "fine-tuned afterwards to recover" if removals else "fine-tuned"
    if not removals:
        return f"{name}, {training}.\n"
    times = f" in {len(removals)} prunings" if len(removals) > 1 else ""
    return (
        f"{name} without {100 * total_share_removed(provenance):.1f} % of the weights of its decoder layers: "
        f"attention heads and FFN columns removed{times} by [SlimGPT](https://arxiv.org/abs/2412.18110), layer by "
        f"layer, the weights that stay updated to make up for them; {training if trained else 'no training'}.\n"
    )


def _kept(config: PreTrainedConfig, masks: list[LayerMask] | None) -> list[tuple[int, int, int, int]]:
    """Heads, kv heads, FFN width and experts of every layer."""
    if masks:
        return [
            (len(mask.kept_heads), len(mask.kept_kv_heads), mask.kept_width, mask.shape.num_experts) for mask in masks
        ]
    shapes = layer_shapes(config)
    return [(shape.num_heads, shape.num_kv_heads, shape.ffn_width, shape.num_experts) for shape in shapes]


def _sizes(base: dict[str, Any], parameters: int, name: str, kept: list[tuple[int, int, int, int]]) -> str:
    total = markdown_table(("", "base", name), [("parameters", f"{base['parameters']:,}", f"{parameters:,}")])
    rows = []
    for index, (layer, dense) in enumerate(zip(kept, base["layers"], strict=True)):
        heads, groups, columns = (f"{now} of {before}" for now, before in zip(layer[:3], dense, strict=True))
        experts = f" (each of {layer[3]} experts)" if layer[3] else ""
        rows.append((index, heads, groups, columns + experts))
    return f"{total}\n\n{markdown_table(('layer', 'heads', 'key/value heads', 'FFN columns'), rows)}\n"


def _method(steps: list[dict[str, Any]]) -> str:
    tables = [markdown_table(("", ""), list(step["settings"].items())) + "\n" for step in steps]
    if len(steps) == 1:
        return tables[0]
    titles = [f"### {number}. {step['kind'].capitalize()}\n" for number, step in enumerate(steps, 1)]
    return "\n".join(part for pair in zip(titles, tables, strict=True) for part in pair)


def pruning_settings(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a card says of a pruning run.

    Args:
        record: content of its ``run.json``.
    """
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
    return [
        ("pruning ratio", ratio),
        ("compensation", "no" if arguments["no_compensate"] else "yes"),
        ("unit in grouped-query attention", arguments["gqa_unit"]),
        ("score of heads", "exact error" if arguments["exact_heads"] else "grouped Cholesky"),
        ("FFN columns of a step", arguments["column_group"] or "dynamic group size"),
        ("beginnings of text besides the samples", arguments["sink_windows"] or 0),
        ("damping", f"{arguments['percdamp']:g}"),
        ("calibration text", " + ".join(Path(source["name"]).name for source in calibration["sources"])),
        ("first token of a sample", "BOS" if calibration["bos"] else "text"),
        ("calibration samples", samples),
        ("their fingerprint (sha256)", calibration["samples_sha256"]),
        ("versions", version_list(record)),
    ]


def version_list(record: dict[str, Any]) -> str:
    """The versions of a run on one line."""
    return ", ".join(f"{package} {version}" for package, version in record["versions"].items())


def _allocation(arguments: dict[str, Any]) -> str:
    rounds = arguments["refine"]
    return f"{arguments['allocation'] or 'uniform'}{f', refined {rounds} ×' if rounds else ''}"


def _perplexities(measured: list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None) -> str:
    columns = measured if isinstance(measured, dict) else {"perplexity": measured or []}
    lists = list(columns.values())
    if not lists[0]:
        return "Not measured.\n"
    rows = [
        (
            *(entries[0]["dataset"], entries[0]["seqlen"], "BOS" if entries[0]["bos"] else "text"),
            *(f"{entry['perplexity']:.2f}" for entry in entries),
        )
        for entries in zip(*lists, strict=True)
    ]
    return markdown_table(("text", "tokens of a window", "the first of them", *columns), rows) + "\n"


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
        'LoRA by peft: `LoraConfig(target_modules="all-linear")` adapts every linear map of the layers.\n',
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
