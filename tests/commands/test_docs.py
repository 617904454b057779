"""Test the docs: their commands run, and the flags, fields, links and tests that they name exist.

In README.md, CONTRIBUTING.md, SECURITY.md and docs/*.md, every line of a fenced block that begins
with `python -m lstm_jax.` (with or without `$ ` before it) is a command. A `#` begins a comment,
and a backslash at the end of a line continues the command. The commands of a page run in order, in
one directory, and must succeed. In this directory,

- `experiments/` is copied from the clone; `my.txt` and each file in --config.data.path or --text is
  a text of 20,000 characters; the JSON file in --vocabulary is its vocabulary;
- a block whose first line is `# NAME.py` is the file of that name;
- training is short: it gets the flags in `SIZES`, and reads 4,000 characters if the command names
  no text;
- a working directory that a command reads, and that no earlier command made, is a tiny trained run.

An HTML comment on the line above a block changes that:

    <!-- not run: it needs two hosts -->      omits the block
    <!-- run with: --trials=1 -->             adds flags to each of its commands

Other lines are not run. For `python benchmarks/...`, the flags are looked up in the file.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import commands
import runs
from lstm_jax import config
from pages import find_blocks

ROOT = Path(__file__).parents[2]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES = [*FRONT, *sorted((ROOT / "docs").glob("*.md"))]
# Flags for a tiny run. Pages add flags to other commands in comments.
SIZES = [
    *runs.TINY,
    *("--config.model.num_layers=1", "--config.num_epochs=1", "--config.sample.length=20"),
]
# Flags whose value is an input file.
TEXTS = ("--config.data.path", "--text", "--data_path")


def find_commands(page: Path) -> list[list[str]]:
    """Return the commands of a page to run, with the flags that its comments add."""
    lines = []
    for block in find_blocks(page):
        if block.comment.startswith("not run: "):
            continue
        extra = shlex.split(block.comment.removeprefix("run with: ")) if block.comment else []
        for command in block.commands:
            if command[1] == "-m" and command[2].startswith("lstm_jax."):
                lines.append([*command, *extra])
    return lines


def get_flag(command: list[str], flag: str) -> str | None:
    """Return the value of a flag of a command, from `--flag value` or `--flag=value`."""
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        if argument == flag:
            return following
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def prepare_command(
    command: list[str], directory: Path, text_file: Path, trained: Path
) -> list[str]:
    """Create the files that a command reads, and return the command to run."""
    module = command[2].removeprefix("lstm_jax.")
    for flag in TEXTS:
        for name in re.split("[,;]", get_flag(command, flag) or ""):
            if name and name != "-":
                name = name.replace("*", "all")
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(text_file, directory / name)
    vocabulary = get_flag(command, "--vocabulary")
    if vocabulary and not (directory / vocabulary).exists():
        shutil.copy(trained / "vocabulary.json", directory / vocabulary)
    read = [get_flag(command, "--init_from")]
    creates_workdir = module in ("main", "sweep") or get_flag(command, "--from") is not None
    if not creates_workdir:
        read.append(get_flag(command, "--workdir"))
    for name in read:
        if name and not (directory / name).exists():
            shutil.copytree(trained, directory / name)
    if module == "main":
        command = [*command, *SIZES]
        if get_flag(command, "--config.data.path") is None:
            text = text_file.read_text(encoding="utf-8")[:4000]
            (directory / "short.txt").write_text(text, encoding="utf-8")
            command.append("--config.data.path=short.txt")
    return command[2:]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, text_file: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    shutil.copy(text_file, tmp_path / "my.txt")
    monkeypatch.syspath_prepend(tmp_path)
    for block in find_blocks(page):
        if name := re.match(r"# (\w+\.py)\n", block.text):
            (tmp_path / name[1]).write_text(block.text, encoding="utf-8")
    for command in find_commands(page):
        module, *arguments = prepare_command(command, tmp_path, text_file, trained)
        # A mesh needs a process of its own, because JAX's devices are fixed when it starts.
        if any(argument.startswith("--config.mesh.") for argument in arguments):
            result = commands.run_python("-m", module, *arguments, cwd=tmp_path)
        else:
            result = commands.run(module.removeprefix("lstm_jax."), *arguments, cwd=tmp_path)
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}{result.stderr}"


def find_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_that_a_page_names_exists(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)", content):
        if not re.match(r"\w+:", target):
            file = page.parent / target if target else page
            assert file.exists(), f"the link to {target}"
            assert not anchor or anchor in find_anchors(file), f"the link to {target}#{anchor}"
    for block in find_blocks(page):
        for command in block.commands:
            if command[1].startswith(("benchmarks/", "tests/", "notebooks/")):
                source = (ROOT / command[1]).read_text(encoding="utf-8")
                for flag in re.findall(r"--([a-z_]+)", " ".join(command)):
                    assert re.search(rf'"(--)?{flag}"|\b{flag}=', source), f"{command}: {flag}"
    for named in re.findall(r"\btests/[\w/]+\.py|(?<=`)[a-z_]+/[a-z_]+\.py(?=`)", content):
        assert (ROOT / named).exists() or (ROOT / "lstm_jax" / named).exists(), named
    # Check fields and flags between backticks.
    folders = ("lstm_jax", "benchmarks", "examples")
    sources = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    for quoted in re.findall(r"`([^`\n]+)`", content):
        for field in re.findall(r"--config\.([a-z0-9_.]+[a-z0-9_])", quoted):
            is_option = field.startswith(f"{config.OPTIONS}.")
            assert is_option or field in config.FIELDS, f"--config.{field}"
        if quoted.startswith("--") and not quoted.startswith("--config"):
            flag = quoted[2:].split("=")[0].split(" ")[0].strip(",")
            names = {flag, flag.removeprefix("no")}
            is_known = any(re.search(rf'"(--)?{name}"|\b{name}=', code) for name in names)
            assert is_known, f"--{flag}"


def test_every_promise_of_reliability_md_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| event | result | test |\n| --- | --- | --- |\n")
    promises = table.partition("\n\n")[0].splitlines()
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", promise.rsplit("|", 2)[1])
        assert named, f"no test holds this promise: {promise}"
        for file, test in named:
            (path,) = (ROOT / "tests").rglob(file)
            source = path.read_text(encoding="utf-8")
            assert f"def {test}(" in source if test else "def test_" in source, f"{file}::{test}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers", "library"])
def test_the_code_of_a_page_runs(
    name: str, trained: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("equinox")
    shutil.copytree(trained, tmp_path / "runs" / "quick")
    shutil.copy(text_file, tmp_path / "my.txt")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in find_blocks(ROOT / "docs" / f"{name}.md"):
        exec(compile(block.text, f"docs/{name}.md", "exec"), namespace)
