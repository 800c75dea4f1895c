"""``veneer version``: Veneer and the libraries that decide numbers."""

from __future__ import annotations

from veneer.cli.options import Json


def version(json: Json = False) -> None:
    """Print the versions of Veneer and of the libraries that decide numbers."""
    from veneer.cli.output import print_json
    from veneer.run import package_versions

    versions = package_versions()
    if json:
        print_json(versions)
        return
    for name, number in versions.items():
        print(f"{name:<14} {number}")
