"""The folders shadow nothing and depend on each other in one direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "trainer": {"trainer", "models", "comm", "kernels"},
    "models": {"models", "kernels"},
    "comm": {"comm"},
    "kernels": {"kernels"},
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependency_direction(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files or folder == "kernels"
    for path in files:
        names = imported_modules(path)
        ours = {name.split(".")[1] for name in names if name.startswith("stepline.")}
        assert ours <= MAY_IMPORT[folder], f"{path} imports {ours - MAY_IMPORT[folder]}"
        others = {name.split(".")[0] for name in names} - {"stepline"}
        if folder in ("comm", "kernels"):
            allowed = {"torch", "triton", *sys.stdlib_module_names}
            allowed |= {"deepspeed"} if path.name == "zero.py" else set()
            assert others <= allowed, f"{path} imports {others - allowed}"
        if folder in ("models", "kernels"):
            assert not {n for n in names if n.startswith("torch.distributed")}, f"{path} knows of ranks"


def test_folders_are_no_top_level_packages():
    assert not [f for f in MAY_IMPORT if (ROOT / f / "__init__.py").exists()]


def test_nothing_is_shadowed_from_the_repository_root():
    """Jupyter imports a package `comm`, transformers one named `kernels`."""
    code = "import comm, ipykernel, transformers; print(comm.__file__); print(ipykernel.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    for line in out.stdout.splitlines():
        assert "site-packages" in line


def test_commands_start_without_torch():
    """`--help` must answer at once; torch alone takes seconds."""
    code = "import sys; import stepline.trainer.cli, stepline.trainer.plan.command; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "False", out.stderr
