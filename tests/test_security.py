"""What may not be in the code: nothing there can run code out of a file that is read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted(path for name in ("src", "scripts", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py"))

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
YAML_LOADERS = ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"}
UNSAFE_CALLS |= {f"yaml.{name}" for name in YAML_LOADERS}
UNSAFE_SWITCHES = {"trust_remote_code", "allow_pickle", "shell"}
READERS = {"from_pretrained", "from_config"}  # of transformers, which may run a model's own code


def dangers(source: str) -> list[str]:
    """Each use of something that can run code out of a data file, as `line: what`."""
    tree = ast.parse(source)
    names = imported(tree)
    found = [(node.lineno, what) for node in ast.walk(tree) if (what := danger(node, names))]
    return [f"{line}: {what}" for line, what in sorted(found)]


def imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return names


def danger(node: ast.AST, names: dict[str, str]) -> str | None:
    match node:
        case ast.Import():
            return next((one.name for one in node.names if one.name.split(".")[0] in UNPICKLERS), None)
        case ast.ImportFrom(module=str(module)):
            loads = any(f"{module}.{one.name}" in UNSAFE_CALLS for one in node.names)
            return module if loads or module.split(".")[0] in UNPICKLERS else None
        case ast.Call():
            return call_danger(node, names)
        case ast.keyword(arg=str(switch), value=value) if switch in UNSAFE_SWITCHES:
            return None if isinstance(value, ast.Constant) and value.value is False else switch
        case ast.Dict() if any(isinstance(key, ast.Constant) and key.value in UNSAFE_SWITCHES for key in node.keys):
            return "a switch in a dictionary"
    return None


def call_danger(call: ast.Call, names: dict[str, str]) -> str | None:
    first, dot, rest = ast.unparse(call.func).partition(".")
    name = f"{names.get(first, first)}{dot}{rest}"
    if name in UNSAFE_CALLS:
        return name
    owner, _, method = name.rpartition(".")
    if method not in READERS or any(keyword.arg == "trust_remote_code" for keyword in call.keywords):
        return None
    last = owner.rpartition(".")[2]
    own = last.startswith("Peft") or (
        last.endswith("Config") and last != "AutoConfig"
    )  # PEFT's and ours: they run none
    return None if own else f"{name} without trust_remote_code=False"


def test_the_code_is_searched() -> None:
    assert len(CODE) > 200 and {path.parts[len(ROOT.parts)] for path in CODE} >= {"src", "scripts", "benchmarks"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_out_of_a_file(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle as safe",
        "import dill.source",
        "from joblib import load",
        "import shelve, json",
        "from marshal import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "torch.save(model, path)",
        "import torch as t\nt.load(path)",
        "from torch import load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load_all(text)",
        "AutoModel.from_pretrained(name)",
        "kind.from_pretrained(name, **options)",
        "transformers.AutoConfig.from_pretrained(name)",
        "kind.from_config(config)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile(text)",
        "json.load(file)",
        "numpy.load(path, allow_pickle=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "PeftModel.from_pretrained(base, folder)",
        "MiloraConfig.from_pretrained(folder)",
        "subprocess.run(command, shell=False)",
    ],
)
def test_the_search_lets_pass(source: str) -> None:
    assert dangers(source) == []
