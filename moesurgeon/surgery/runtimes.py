"""What runtimes make of a result, and the file that one of them needs."""

from __future__ import annotations

from collections.abc import Collection

from moesurgeon.errors import UsageError
from moesurgeon.families.runtimes import DEEPSEEK_CONFIG, STATEMENTS
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan, identity


def runtime_statements(result: Anatomy, files: Collection[str]) -> list[str]:
    """Return what serving runtimes make of ``result`` where it is not what one would expect; a line each.

    ``files``: the names of those in its folder.
    """
    return [
        statement.says
        for statement in STATEMENTS
        if (statement.family, statement.layout) == (result.family.name, result.layout.name)
        and statement.holds(result.config, frozenset(files))
    ]


def plan_config_class(source: Anatomy, files: Collection[str]) -> EditPlan:
    """Plan to add the class for its config that vLLM needs to read ``source``, and the entry in auto_map.

    Raises UsageError for another family or layout, and where one of ``files`` is such a file already.
    """
    added = DEEPSEEK_CONFIG
    if (source.family.name, source.layout.name) != (added.family, added.layout):
        raise UsageError(
            f"--vllm-config is for DeepSeek-MoE v1 in its own names, expert by expert, and the result is "
            f"{source.family.title}, {source.layout.name}; leave it out"
        )
    if added.file in files:
        raise UsageError(f"the checkpoint has a {added.file} already, which is copied: leave out --vllm-config")
    before = source.config.get("auto_map")
    auto_map = {**(before if isinstance(before, dict) else {}), "AutoConfig": f"{added.file[:-3]}.{added.name}"}
    return EditPlan(
        identity(source).outputs,
        config={"auto_map": auto_map},
        record=[{"operation": "config-class", "file": added.file}],
        files={added.file: added.text},
    )
