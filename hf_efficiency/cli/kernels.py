"""`hf-efficiency kernels build|check|push`: the kernel projects in the form of the Kernel Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    # the `kernels` library loads torch: only here
    from hf_efficiency.integrations import kernels_hub

    folder = Path(args.folder)
    if args.action == "build":
        chosen = [kernels_hub.find_project(name) for name in args.names] or list(kernels_hub.projects().values())
        for project in chosen:
            print(f"built {project.name} in {kernels_hub.build(project, folder / project.import_name)}")
    elif args.action == "check":
        for variant, layers in kernels_hub.check(folder).items():
            print(f"{variant}: loads; layers: {', '.join(layers) or 'none'}")
    else:
        print(f"Uploaded to {kernels_hub.push(folder, args.repo, private=args.private)}")
    return 0
