"""Model card of a pruned or recovered model, made from its provenance."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from slim_utils.common.atomic_output import write_text_atomic
from slim_utils.common.loading import is_multimodal_checkpoint, load_config, model_on_meta
from slim_utils.families import FAMILIES, PLUGIN_FAMILIES, SERVED_FAMILIES, SERVED_STOCK, LayerShape, layer_shapes
from slim_utils.gguf_families import is_exportable
from slim_utils.masks import LayerMask
from slim_utils.output.provenance import (
    CARD_FILE,
    RECOVERY,
    copy_license_files,
    pruning_steps,
    total_share_removed,
    write_provenance,
)
from slim_utils.profiling.model_stats import count_parameters
from slim_utils.profiling.tables import markdown_table
from slim_utils.pruning_config import DEFAULT_BATCH, DEFAULT_CONTEXT, DEFAULT_WORKLOAD, MACS_TOKENS

TEMPLATE = Path(__file__).with_name("model_card.md.j2")

Perplexities = list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None


def vllm_options(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Arguments of ``vllm.LLM`` for a pruned model with this configuration; ``None`` for untested families.

    vLLM's Qwen2 requires heads that fill the hidden size; its LLaMA does not, and supports the biases of Qwen2.
    """
    if config.model_type in SERVED_STOCK:
        shape = layer_shapes(config)[0]
        if config.model_type == "qwen2" and shape.num_heads * shape.head_dim != config.hidden_size:
            return {"hf_overrides": {"architectures": ["LlamaForCausalLM"], "qkv_bias": True}}
        return {}
    if FAMILIES[config.model_type].base_type in SERVED_FAMILIES:
        return {"model_impl": "transformers", "trust_remote_code": True}
    return None


def model_card(
    provenance: dict[str, Any],
    config: PreTrainedConfig,
    parameters: int,
    masks: list[LayerMask] | None = None,
    perplexity: Perplexities = None,
    address: str = "DIR",
    multimodal: bool = False,
) -> str:
    """Text of the card of a pruned or recovered model.

    Args:
        provenance: provenance of the model, including the steps of this run.
        config: configuration of the model.
        parameters: number of parameters.
        masks: masks of the layers, if ``config`` has the shapes before removal.
        perplexity: perplexities at the end of this run, or ``before`` and ``after`` it; ``None`` if not measured.
        address: name or path of the model in the example commands.
        multimodal: whether the model is a multimodal one, and the other arguments those of its language model.
    """
    base, steps = provenance["base"], provenance["steps"]
    num_prunings, trained = len(pruning_steps(provenance)), any(step["kind"] == RECOVERY for step in steps)
    base_type = FAMILIES[config.model_type].base_type
    stock, options = base_type == config.model_type, None if multimodal else vllm_options(config)
    total = ("parameters", f"{base['parameters']:,}", f"{parameters:,}")
    changes = ["pruned"] * bool(num_prunings) + ["fine-tuned"] * trained
    title = f"{base['name'].rsplit('/', 1)[-1]}, {' and '.join(changes)}"
    card = ModelCard.from_template(
        _card_data(provenance, title, perplexity, "image-text-to-text" if multimodal else "text-generation"),
        template_path=str(TEMPLATE),
        title=title,
        name=base["name"],
        text_of=base.get("text_of"),
        multimodal=multimodal,
        num_prunings=num_prunings,
        share=f"{100 * total_share_removed(provenance):.1f}" if num_prunings else "",
        trained=trained,
        total_table=markdown_table(("", "base", "pruned" if num_prunings else "this model"), [total]),
        removed=_removed_units(provenance),
        layer_table=_layer_table(base, [mask.kept_shape for mask in masks] if masks else layer_shapes(config)),
        steps=[(step["kind"].capitalize(), markdown_table(("", ""), step["settings"].items())) for step in steps],
        perplexity_table=_perplexity_table(perplexity),
        address=address,
        stock=stock,
        fewer_kv_heads=not stock and _has_fewer_kv_heads(base, config),
        vllm_flags=None if options is None else _vllm_flags(options),
        vllm_plugin=not stock and base_type in PLUGIN_FAMILIES and not multimodal,
        exported=is_exportable(config) and not multimodal,
        license_text=base["card"].get("license_name") or base["card"].get("license"),
    )
    return f"{card}\n"


def _card_data(provenance: dict[str, Any], title: str, perplexity: Perplexities, pipeline: str) -> ModelCardData:
    """Metadata of the card for the hub: base, licence, language, data sets and final perplexities."""
    base, steps = provenance["base"], provenance["steps"]
    final = perplexity.get("after", []) if isinstance(perplexity, dict) else perplexity or []
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry["dataset"],
            dataset_name=entry["dataset"],
            metric_type="perplexity",
            metric_value=round(entry["perplexity"], 4),
            metric_name=f"perplexity, windows of {entry['seqlen']} tokens{', with BOS' if entry['bos'] else ''}",
        )
        for entry in final
        if math.isfinite(entry["perplexity"])
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["slimgpt", *(["pruned", "structured-pruning"] if pruning_steps(provenance) else [])],
        base_model=base["name"] if base["on_hub"] else None,
        datasets=sorted({name for step in steps for name in step["datasets"]}) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **base["card"],
    )


def write_card(folder: Path, provenance: dict[str, Any], model_path: str, **options: Any) -> None:
    """Write provenance, model card and licence files beside the weights in ``folder``.

    Args:
        folder: checkpoint folder.
        provenance: provenance of the model, including the steps of this run.
        model_path: input model of the run, whose licence files are copied.
        options: further arguments of :func:`model_card`.
    """
    config = load_config(str(folder), trust_remote_code=False, language_model=True)
    options["multimodal"] = is_multimodal_checkpoint(str(folder))
    parameters = count_parameters(model_on_meta(config))
    write_provenance(folder, provenance)
    copy_license_files(model_path, folder)
    write_text_atomic(folder / CARD_FILE, model_card(provenance, config, parameters, **options))


def _layer_table(base: dict[str, Any], kept: list[LayerShape]) -> str:
    """Markdown table of the heads, kv heads, FFN columns and experts that every layer keeps."""
    rows = []
    # Not in the provenance that earlier versions wrote, which removed no experts and knew no shared ones.
    dense_experts = base.get("experts") or [layer.num_experts for layer in kept]
    dense_shared = base.get("shared_columns") or [layer.num_shared_columns for layer in kept]
    for index, (layer, sizes) in enumerate(zip(kept, base["layers"], strict=True)):
        counts = layer.num_heads, layer.num_kv_heads, layer.ffn_width
        heads, groups, columns = (
            f"{size} of {total}" if total else "–" for size, total in zip(counts, sizes, strict=True)
        )
        if layer.num_experts != dense_experts[index]:
            columns += f" (each of {layer.num_experts} of {dense_experts[index]} experts)"
        elif layer.num_experts:
            columns += f" (each of {layer.num_experts} experts)"
        if layer.num_shared_columns:
            columns += f", {layer.num_shared_columns} of {dense_shared[index]} of the shared expert"
        rows.append((index, heads, groups, columns))
    return markdown_table(("layer", "heads", "key/value heads", "FFN columns"), rows)


def _removed_units(provenance: dict[str, Any]) -> str:
    """What the pruning steps of ``provenance`` removed."""
    steps = pruning_steps(provenance)
    return " and ".join(
        sorted({step["settings"].get("unit of removal", "attention heads and FFN columns") for step in steps})
    )


def _unit_settings(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of the settings of the units that a run removes."""
    if arguments.get("expert_unit") == "expert":
        refit = "none" if arguments["no_compensate"] else "least squares, where held-out samples agree"
        return [
            ("unit of removal", "whole experts"),
            ("score of experts", "REAP (mean of gate times norm of the output)"),
            ("refit of the other experts", refit),
        ]
    return [
        ("compensation", "no" if arguments["no_compensate"] else "yes"),
        ("unit in grouped-query attention", arguments["gqa_unit"]),
        ("score of heads", "exact error" if arguments["exact_heads"] else "grouped Cholesky"),
        ("FFN columns of a step", arguments["column_group"] or "dynamic group size"),
    ]


def pruning_settings(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of a pruning run for the model card.

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
    elif arguments.get("target_latency"):
        workload = arguments["latency_of"] or DEFAULT_WORKLOAD
        device = record["latency"]["table"]["device"]
        ratio = f"down to {arguments['target_latency']} of {workload} on {device} ({_allocation(arguments)})"
    elif arguments.get("target_macs") or arguments.get("target_memory"):
        flag = "target_macs" if arguments["target_macs"] else "target_memory"
        unit = f"multiply-accumulates for {MACS_TOKENS} tokens"
        if arguments["target_memory"]:
            batch, context = arguments["at_batch"] or DEFAULT_BATCH, arguments["at_context"] or DEFAULT_CONTEXT
            unit = f"weights and KV cache for {batch} × {context} tokens"
        ratio = f"down to {arguments[flag]} of {unit} ({_allocation(arguments)})"
        if target := record.get("target"):
            ratio += f"; {target['achieved'] / target['dense']:.4f} of the model's achieved"
    elif arguments["profile"]:
        ratio = f"those of {Path(arguments['profile']).name}"
    return [
        ("pruning ratio", ratio),
        *_unit_settings(arguments),
        ("attention-sink windows", arguments["sink_windows"] or 0),
        ("damping", f"{arguments['percdamp']:g}"),
        ("calibration text", " + ".join(Path(source["name"]).name for source in calibration["sources"])),
        ("first token of a sample", "BOS" if calibration["bos"] else "text"),
        ("calibration samples", samples),
        ("their fingerprint (sha256)", calibration["samples_sha256"]),
        ("versions", version_list(record)),
    ]


def version_list(record: dict[str, Any]) -> str:
    """Package versions of a run on one line."""
    return ", ".join(f"{package} {version}" for package, version in record["versions"].items())


def _allocation(arguments: dict[str, Any]) -> str:
    rounds = arguments["refine"]
    return f"{arguments['allocation'] or 'uniform'}{f', refined {rounds} ×' if rounds else ''}"


def _perplexity_table(measured: Perplexities) -> str:
    """Markdown table with one row per text and window length; empty if nothing was measured."""
    columns = measured if isinstance(measured, dict) else {"perplexity": measured or []}
    lists = list(columns.values())
    if not lists[0]:
        return ""
    rows = [
        (
            *(entries[0]["dataset"], entries[0]["seqlen"], "BOS" if entries[0]["bos"] else "text"),
            *(f"{entry['perplexity']:.2f}" for entry in entries),
        )
        for entries in zip(*lists, strict=True)
    ]
    return markdown_table(("text", "tokens per window", "first token", *columns), rows)


def _has_fewer_kv_heads(base: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether a layer with attention has fewer key/value heads than the top level of the configuration.

    Where those of the stock class differ by layer, than in the base.
    """
    family, shapes = FAMILIES[config.model_type], layer_shapes(config)
    dense = [family.num_kv_heads(config)] * len(shapes)
    if family.kv_heads_key in family.layer_keys:
        dense = [kv_heads for _, kv_heads, _ in base["layers"]]
    return any(shape.num_kv_heads not in (0, kv_heads) for shape, kv_heads in zip(shapes, dense, strict=True))


def _vllm_flags(options: dict[str, Any]) -> str:
    arguments = []
    for name, value in options.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(value if isinstance(value, str) else shlex.quote(json.dumps(value)))
    return "".join(f" {argument}" for argument in arguments)
