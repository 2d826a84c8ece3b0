"""What scores Reasoning Gym's data sets runs no part of a completion: by its source, and by what the interpreter sees.

Both guard the next release of Reasoning Gym: a data set whose scoring comes to evaluate answers fails here.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from reasoning_gym.factory import DATASETS

from rewards.gym_scorers import SCORERS
from tests.rewards.gym_samples import NAMES

EVALUATING = {
    "eval", "exec", "compile", "parse_expr", "sympify", "S", "lambdify", "pickle", "marshal", "shelve", "dill",
    "__import__", "import_module", "system", "popen", "Popen", "subprocess", "ctypes", "open", "globals", "setattr",
}  # fmt: skip
# They evaluate their own entry, never the answer: the calls as they stand in the source.
ENTRY_ONLY = {"number_sorting": {"eval(entry['answer'])"}, "bitwise_arithmetic": {"eval(problem)"}}
UNUSED = {"sokoban": {"open(self.path)"}}  # of a game that is loaded from a file; scoring has no path
HARMLESS_PACKAGES = {"math", "re", "json", "decimal", "fractions", "numpy", "magiccube", "zss", "copy", "typing"}
HARMLESS_PACKAGES |= {"builtins", "enum", "dataclasses", "collections", "random", "itertools", "string", "datetime"}


class Reached:
    """What a data set's `score_answer` reaches within reasoning_gym, read from the source."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.calls: set[str] = set()
        self.packages: set[str] = set()
        self._seen: set[Any] = set()
        self._function(kind.score_answer)

    def _function(self, function: Any) -> None:
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType) or function in self._seen:
            return
        if function.__code__.co_filename == "<string>":  # a dataclass's own
            return
        self._seen.add(function)
        tree = _tree(function)
        imported = dict(_imports(tree, function.__module__))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                self._call(node, function, imported)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self._object(imported.get(node.id, function.__globals__.get(node.id)))
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            ):
                self._function(getattr(self.kind, node.attr, None) or self._set_by_init(node.attr))

    def _call(self, node: ast.Call, function: FunctionType, imported: dict[str, Any]) -> None:
        called = node.func
        if isinstance(called, ast.Name) and called.id in EVALUATING:
            own = imported.get(called.id, function.__globals__.get(called.id))
            if not _is_of_the_gym(own):  # propositional_logic has a parse_expr of its own, which is followed
                self.calls.add(ast.unparse(node))
        if isinstance(called, ast.Attribute) and called.attr in EVALUATING and ast.unparse(called) != "re.compile":
            self.calls.add(ast.unparse(node))

    def _object(self, found: Any) -> None:
        if isinstance(found, ModuleType):
            self.packages |= {found.__name__.partition(".")[0]} - {"reasoning_gym"}
        elif _is_of_the_gym(found):
            self._function(found)
            if isinstance(found, type) and found not in self._seen:
                self._seen.add(found)
                for member in vars(found).values():
                    self._function(getattr(member, "__func__", member))
                    self._function(getattr(member, "fget", None))
        elif callable(found):
            self.packages.add(str(getattr(found, "__module__", None) or "builtins").partition(".")[0])

    def _set_by_init(self, name: str) -> Any:
        """A class or function that __init__ keeps as an attribute."""
        function = self.kind.__init__
        tree = _tree(function)
        imported = dict(_imports(tree, function.__module__))
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=[ast.Attribute(attr=attribute)], value=ast.Name(id=kept)) if attribute == name:
                    self._object(imported.get(kept, function.__globals__.get(kept)))
        return None


def _tree(function: Any) -> ast.AST:
    source = inspect.getsource(function)
    return ast.parse(f"class _:\n{source}" if source[0].isspace() else source)  # a method, with its indentation


def _imports(tree: ast.AST, module: str) -> Iterator[tuple[str, Any]]:
    """Names that a function imports for itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            package = module.rsplit(".", node.level)[0] + "." if node.level else ""
            for alias in node.names:
                source = __import__(package + node.module, fromlist=[alias.name])
                yield alias.asname or alias.name, getattr(source, alias.name)


def _is_of_the_gym(found: Any) -> bool:
    return str(getattr(found, "__module__", "")).startswith("reasoning_gym")


def test_no_data_set_s_scoring_evaluates_the_answer_but_those_that_have_another() -> None:
    reached = {name: Reached(DATASETS[name][0]) for name in NAMES}
    calls = {name: found.calls for name, found in reached.items() if found.calls}
    print(calls)
    assert {name: found for name, found in calls.items() if name not in SCORERS} == ENTRY_ONLY | UNUSED
    assert set(SCORERS) - set(calls) == {"coin_flip", "game_of_life_halting"}, "these two say nothing"
    packages = {name: found.packages - HARMLESS_PACKAGES for name, found in reached.items() if name not in SCORERS}
    assert not {name: new for name, new in packages.items() if new}, "look at what these are called for"


AUDITED = """
import json, sys
from reasoning_gym.factory import DATASETS
from rewards.gym_scorers import SCORERS
from rewards.verify import READING_ERRORS
from tests.rewards.gym_samples import NAMES, right_answer, samples, verdict

WATCHED = ("exec", "compile", "open", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "marshal.",
           "pickle.", "code.__new__", "function.__new__", "builtins.breakpoint",
           "object.", "mmap.", "signal.", "urllib.")
HOSTILE = [text.replace("PATH", sys.argv[1]) for text in json.loads(sys.argv[2])]
watching, events = False, []

def hook(event, arguments):
    if watching and event.startswith(WATCHED):
        shown = [a.co_filename + a.co_name if hasattr(a, "co_name") else repr(a)[:200] for a in arguments]
        events.append(" ".join([event, *shown]))

def told(score):
    global watching
    events.clear()
    watching = True
    try:
        score()
    except READING_ERRORS:
        pass
    finally:
        watching = False
    return list(events)

sys.addaudithook(hook)
seen, usually = {}, {}
for name in NAMES:
    (prompt, *_), verifier = samples(name, 1)
    for harmless in (right_answer(prompt, verifier) or "7", "7", "0.5", "[1, 2]", "{}", "a, b", "x + 1", "A=1", "1/2"):
        verdict(verifier, harmless, prompt)
    usual = told(lambda: verifier.score(right_answer(prompt, verifier) or "7", prompt))
    for text in HOSTILE:
        for completion in (text, f"<answer>{text}</answer>", f"{prompt.answer} {text}"):
            found = told(lambda: verifier.score(completion, prompt))
            if not set(found) <= set(usual):
                seen.setdefault(name, []).append([completion, found])
    usually[name] = usual
control = {}
for name in SCORERS:  # the hook sees what their own scoring does
    (prompt, *_), verifier = samples(name, 1)
    theirs = DATASETS[name][0](DATASETS[name][1](seed=1, size=1))
    control[name] = told(lambda: theirs.score_answer("[print]", prompt.payload["entry"]))
print()  # one of the generators prints
print(json.dumps({"seen": seen, "usual": [name for name in usually if usually[name]], "control": control}))
"""
HOSTILE = [
    "__import__('os').system('touch PATH')",
    "[setattr(__import__('reasoning_gym').factory, 'x', 1)]",
    "open('PATH', 'w').write('x')",
    "__import__('pathlib').Path('PATH').touch()",
    "[x for x in ().__class__.__base__.__subclasses__()]",
    "(lambda f: f(f))(lambda f: f(f))",
    "exec('import socket; socket.socket()')",
    "compile('1', 'a', 'exec')",
    "breakpoint()",
    "globals().update(a=1)",
    "print(1)",
    "f'{__import__(\"os\").getpid()}'",
    "\"\"\"a\"\"\" + str(open)",
    "x.subs(x, __import__('os'))",
    "Symbol('x').__class__",
    "S('__import__(\"os\").getpid()')",
    "lambdify(x, x)",
    "Function('f')(x).func.__globals__",
    "sqrt(__builtins__)",
    "[[__import__('os')]]",
    "{\"__reduce__\": [\"os.system\", \"touch PATH\"]}",
    "cos\nsystem\n(S'touch PATH'\ntR.",
    "!!python/object/apply:os.system ['touch PATH']",
    "${jndi:ldap://127.0.0.1/a}",
    "`touch PATH`; $(touch PATH)",
    "../../../../etc/passwd",
    "P.__class__ ∧ Q",
    "import os; os.system('touch PATH')",
]  # fmt: skip


def test_the_interpreter_sees_nothing_that_a_completion_caused(tmp_path: Any) -> None:
    path = tmp_path / "made"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AUDITED, str(path), json.dumps(HOSTILE)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["seen"] == {}
    assert set(told["usual"]) == set(ENTRY_ONLY)
    assert not path.exists()
    evaluating = set(SCORERS) - {"coin_flip", "game_of_life_halting"}
    assert {name for name, events in told["control"].items() if any("exec" in event for event in events)} == evaluating
