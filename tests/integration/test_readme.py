"""README, docs/ and CONTRIBUTING against the files, flags and commands that they name."""

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path, PurePosixPath

import pytest

import model_evaluate
import model_slimming
import test_flops
from scripts import report
from train_utils import finetune_args, finetune_checks

ROOT = Path(__file__).resolve().parents[2]
README_LIMIT = 15_000
# Texts by path: pages for users, then all documents.
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES["README.md"] = README
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = PAGES | {"CONTRIBUTING.md": CONTRIBUTING}
for folder in ("benchmarks", "benchmarks/results"):
    DOCUMENTS[f"{folder}/README.md"] = (ROOT / folder / "README.md").read_text(encoding="utf-8")
# The page, or the section of a page, that lists the flags of a script.
FLAG_LISTS: dict[tuple[str, str], Callable[[], argparse.ArgumentParser]] = {
    ("docs/prune.md", ""): model_slimming.build_parser,
    ("docs/evaluate.md", "Zero-shot tasks"): model_evaluate.build_parser,
    ("docs/evaluate.md", "Count and time"): test_flops.build_parser,
}
# Pages that name flags of a single script without listing them all.
ONE_SCRIPT = {
    ("docs/recover.md", ""): finetune_args.build_parser,
    ("docs/large-models.md", ""): model_slimming.build_parser,
}
# Flags of torchrun, of accelerate, of vLLM and of the recipes.
EXTERNAL_FLAGS = {
    "--num_processes",
    "--nproc_per_node",
    "--nnodes",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--model-impl",
    "--trust-remote-code",
}
EXTERNAL_FLAGS |= {"--smoke"}


def commands(start: str) -> list[str]:
    """Commands of the pages' bash blocks that begin with ``start``, line continuations joined."""
    blocks = [block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


def arguments_of(command: str, script: str) -> list[str]:
    """Arguments that ``command`` gives to ``script``, without its redirections."""
    argv = shlex.split(command.partition("2>&1")[0])
    return argv[argv.index(script) + 1 :]


def test_pruning_commands_as_shown_are_parsed():
    lines = commands("python model_slimming.py")
    lines += [line for line in commands("torchrun") if "model_slimming.py" in line]
    assert len(lines) == 9
    for command in lines:
        args = model_slimming.build_parser().parse_args(arguments_of(command, "model_slimming.py"))
        assert args.save_dir == "OUT"


@pytest.mark.parametrize(("script", "count"), [(model_evaluate, 2), (test_flops, 4)])
def test_measuring_commands_as_shown_are_parsed(script, count):
    lines = commands(f"python {script.__name__}.py")
    assert len(lines) == count
    for command in lines:
        script.build_parser().parse_args(shlex.split(command)[2:])


def test_evaluation_commands_of_several_processes_as_shown_are_parsed():
    lines = [line for line in commands("torchrun") + commands("accelerate") if "model_evaluate.py" in line]
    assert len(lines) == 2
    for command in lines:
        model_evaluate.build_parser().parse_args(arguments_of(command, "model_evaluate.py"))


def test_report_command_as_shown_is_parsed():
    (command,) = commands("python -m scripts.report")
    args = report.build_parser().parse_args(shlex.split(command)[3:])
    assert (len(args.runs), args.out) == (3, Path("report"))


def test_fine_tuning_commands_as_shown_are_parsed(monkeypatch):
    monkeypatch.setattr(finetune_args, "provide_single_process_group", lambda argv: None)
    sharing = [line for line in commands("torchrun") if "model_finetune.py" in line]
    short_commands = commands("python model_finetune.py")
    assert (len(sharing), len(short_commands)) == (3, 2)
    for command in (*sharing, *short_commands):
        arguments = arguments_of(command, "model_finetune.py")
        for flag in ("--deepspeed", "--fsdp", "--fsdp_config"):
            if flag in arguments:
                # Left out: it would need a process group.
                index = arguments.index(flag)
                assert flag == "--fsdp" or (ROOT / arguments[index + 1]).is_file()
                del arguments[index : index + 2]
        args = finetune_args.parse_args(arguments)
        assert args.model.use_lora != bool(args.data.train_text) and args.training.output_dir == "SFT"


def test_recipe_commands_as_shown_set_variables_of_the_recipe():
    lines = commands("MODEL=") + commands("NPROC=")
    assert len(lines) == 8
    for text in PAGES.values():
        for command in re.findall(r"^.*bash scripts/\w+\.sh$", text, flags=re.MULTILINE):
            *variables, _, script = shlex.split(command)
            recipe = (ROOT / script).read_text(encoding="utf-8")
            for variable in variables:
                assert f"{variable.partition('=')[0]}=${{" in recipe, command


@pytest.mark.parametrize("page", DOCUMENTS)
def test_files_named_in_a_document_exist(page):
    folders = "configs|models|slim_utils|train_utils|ppl_eval|scripts|benchmarks|tests|docs"
    for path in re.findall(rf"(?<![\w./])(?:{folders})/[\w/.-]+\.(?:sh|py|json|md|png|svg)", DOCUMENTS[page]):
        # Paths relative to the page are allowed too.
        assert (ROOT / path).is_file() or (ROOT / page).parent.joinpath(path).is_file() or "NAME" in path, path
    for module in re.findall(r"python -m ([\w.]+)", DOCUMENTS[page]):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def named_flags(text: str) -> set[str]:
    """Flags that ``text`` names."""
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))


def section(page: str, title: str) -> str:
    """The text of ``page``, or of its second-level section ``title``."""
    if not title:
        return PAGES[page]
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return text


def parser_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def test_named_flags_in_mixed_text_are_whole():
    assert named_flags("`--min_sparsity A`, (--max) x--y ---z --a-b=3") == {"--min_sparsity", "--max", "--a-b"}


@pytest.mark.parametrize("place", FLAG_LISTS)
def test_flags_of_a_script_are_all_listed_on_its_page(place):
    assert parser_flags(FLAG_LISTS[place]()) <= named_flags(section(*place))


def test_flags_of_fine_tuning_are_all_listed_unless_refused():
    named = named_flags(PAGES["docs/recover.md"])
    for group in (finetune_args.ModelArguments, finetune_args.DataArguments, finetune_args.SparseArguments):
        for option in fields(group):
            assert (f"--{option.name}" in named) != (option.name in finetune_checks.REFUSED_FLAGS), option.name


@pytest.mark.parametrize("place", FLAG_LISTS | ONE_SCRIPT)
def test_flags_named_on_the_page_of_a_script_exist(place):
    known = (FLAG_LISTS | ONE_SCRIPT)[place]
    assert named_flags(section(*place)) - EXTERNAL_FLAGS <= parser_flags(known()) | set(finetune_args.RENAMED_FLAGS)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_flags_named_in_a_document_are_those_of_a_script(page):
    flags = parser_flags(finetune_args.build_parser()) | set(finetune_args.RENAMED_FLAGS) | EXTERNAL_FLAGS
    flags = flags.union(*(parser_flags(build()) for build in FLAG_LISTS.values()))
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]:
        flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    for path in ROOT.glob("scripts/*.sh"):
        flags |= set(re.findall(r"^ +(--\w+)\)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named_flags(DOCUMENTS[page]) <= flags


def test_readme_size_is_within_its_limit():
    assert len(README.encode()) <= README_LIMIT


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def link_targets(text: str) -> list[str]:
    """Targets of the links and images of a Markdown text, except those to other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(text)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> list[str]:
    """Anchors of the headings of a Markdown text, as GitHub makes them."""
    slugs: list[str] = []
    for heading in re.findall(r"^#+ +(.*?) *$", without_code(text), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{slug}(-\d+)?", other) is not None for other in slugs)
        slugs.append(f"{slug}-{repeated}" if repeated else slug)
    return slugs


def test_link_targets_in_mixed_text_leave_out_code_and_sites():
    text = "[a](b.md#c) ![d](e/f.png) [g](https://h.org) `[i](j)`\n```\n[k](l)\n```\n[m](#n)"
    assert link_targets(text) == ["b.md#c", "e/f.png", "#n"]


def test_anchors_of_headings_are_those_of_github():
    text = "# A b\n```\n# no\n```\n## `--c`, d: (e)\n## A b\n"
    assert anchors(text) == ["a-b", "--c-d-e", "a-b-1"]


@pytest.mark.parametrize("page", DOCUMENTS)
def test_relative_links_of_a_document_resolve(page):
    for target in link_targets(DOCUMENTS[page]):
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_pages_of_docs_are_all_linked_from_readme():
    linked = {target.partition("#")[0] for target in link_targets(README)}
    assert set(PAGES) - {"README.md"} <= linked


def file_tree() -> dict[str, str]:
    """Descriptions in README's file tree by path; folders end in a slash."""
    (block,) = re.findall(r"^## Repository\n+```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    lines: dict[str, str] = {}
    parents: list[str] = []
    for indent, name, described in re.findall(r"^( *)(\S+) *(.*)$", block, flags=re.MULTILINE):
        del parents[len(indent) // 2 :]
        lines["".join([*parents, name])] = described
        parents.append(name)
    return lines


def top_level_folders() -> set[str]:
    """Tracked top-level folders that are not hidden; all folders on disk without git."""
    paths = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"]
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
        tracked = {PurePosixPath(path).parts[0] for path in listed.splitlines()}
        paths = [path for path in paths if path in tracked or not tracked]
    return {path for path in paths if not path.startswith(".")}


def packages() -> set[str]:
    """Packages in ``slim_utils/``."""
    return {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("slim_utils/*/__init__.py")}


def test_paths_of_the_file_tree_exist_and_are_described():
    for path, described in file_tree().items():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
        assert described, path


def test_top_level_folders_and_packages_are_all_in_the_file_tree():
    assert {f"{path}/" for path in top_level_folders() | packages()} <= set(file_tree())
    assert {path.name for path in ROOT.glob("*.py")} <= set(file_tree())


def test_modules_in_the_table_of_contributing_exist():
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", CONTRIBUTING, flags=re.MULTILINE)
    assert packages() | {"slim_utils", "train_utils", "ppl_eval", "models"} <= {folder for folder, _ in rows}
    for folder, modules in rows:
        for module in re.findall(r"`([\w/]+\.py)`", modules):
            assert (ROOT / folder / module).is_file() or (ROOT / module).is_file(), f"{folder}/{module}"
