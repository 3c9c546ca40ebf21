"""`ftcli doctor`: what this machine offers."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, memory and disk, what each extra would add, and what to look out for."""
    from ftcli.cli.console import print_json
    from ftcli.data.cache import default_cache_folder
    from ftcli.reporting.machine import look_at_machine

    report = look_at_machine(default_cache_folder())
    if as_json:
        print_json(report)
    else:
        print(render(report))


def render(report: dict[str, Any]) -> str:
    """The report as people read it."""
    from ftcli.units import format_bytes

    cpu = report["cpu"]
    available = f", {format_bytes(cpu['available'])} available" if cpu["available"] is not None else ""
    lines = [
        f"ftcli {report['ftcli'] or '(not installed)'}, python {report['python']}, {report['platform']}",
        "",
        "packages",
        *(f"  {name:<16} {version or 'missing'}" for name, version in report["packages"].items()),
        "",
        "devices",
        f"  cpu              {cpu['cores']} cores, {format_bytes(cpu['memory'])}{available}, bf16: {', '.join(cpu['flags']) or 'no'}",
        *(
            f"  {device['kind']:<16} {device['name']}, {format_bytes(device['memory'])}, bf16: {'yes' if device['bf16'] else 'no'}"
            for device in report["accelerators"]
        ),
        "",
        "disk",
        *(f"  {format_bytes(free):>10} free  {place}" for place, free in report["disk"].items()),
    ]
    if report["extras"]:
        lines += ["", "extras"]
    for name, extra in report["extras"].items():
        state = "installed" if extra["installed"] else f'pip install "ftcli[{name}]"'
        lines.append(f"  {name:<16} {extra['adds'] or ', '.join(extra['packages'])}: {state}")
    lines += ["", *(f"warning: {warning}" for warning in report["warnings"])] if report["warnings"] else ["", "no warnings"]
    return "\n".join(lines)
