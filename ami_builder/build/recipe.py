"""Recipes: results of the scripts in scripts/, cached by the digest of everything that goes into them."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ami_builder.core.errors import MissingTool
from ami_builder.core.options import Arch
from ami_builder.state.workspace import Workspace, write_atomically
from ami_builder.system import processes
from ami_builder.system.resources import scripts_dir

# Builds of one day use the same package versions; `--refresh` and nightly runs ask again.
RESOLVED_FOR_SECONDS = 12 * 3600
_RESOLVE_TIMEOUT = 300.0
_TIMEOUT = 1800.0
# Programs of another architecture run ten times as long.
_EMULATED_TIMEOUT = 4 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A script, its flags, and the files whose content decides about its result."""

    kind: str
    script: Path
    flags: tuple[str, ...]
    sources: tuple[Path, ...]
    paths: tuple[tuple[str, Path], ...] = ()
    """Flags that name a file: its content counts, not its path."""
    timeout: float = _TIMEOUT

    def text_digest(self) -> str:
        """Return sha256 over the script, its flags and its files."""
        digest = hashlib.sha256(json.dumps(self.flags).encode())
        for source in (*self.sources, *(path for _, path in self.paths)):
            for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
                if file.is_file():
                    digest.update(f"\0{file.relative_to(source.parent)}\0".encode())
                    digest.update(file.read_bytes())
        return digest.hexdigest()

    def resolve(self, workspace: Workspace, log: Path, *, refresh: bool) -> str:
        """Return the digest of the recipe and the package versions that it would install now."""
        text = self.text_digest()
        record = workspace.cache / "resolved" / f"{self.kind}-{text}.json"
        if not refresh:
            try:
                known = json.loads(record.read_text())
                if 0 <= time.time() - known["at"] < RESOLVED_FOR_SECONDS:
                    return str(known["digest"])
            except (OSError, ValueError, KeyError, TypeError):
                pass
        packages: list[str] = []
        # What an earlier run wrote is not this one's error.
        log.unlink(missing_ok=True)
        processes.stream(
            [self.script, "--resolve", *self._argv()],
            log=log,
            what=f"resolving the {self.kind}'s packages",
            env=self._environment(workspace),
            timeout=_RESOLVE_TIMEOUT,
            on_line=packages.append,
            merge=False,
            missing=MissingTool.exit_code,
        )
        digest = hashlib.sha256("\n".join([text, *packages]).encode()).hexdigest()
        write_atomically(record, json.dumps({"at": time.time(), "digest": digest}))
        return digest

    def make(
        self, workspace: Workspace, digest: str, output: str, log: Path, on_line: Callable[[str], None]
    ) -> Path:
        """Return the cached folder of this digest; run the script if there is none."""

        def seen(line: str) -> None:
            # Drop the prefixes of mmdebstrap and of the script: the step has a name.
            if text := line.removeprefix("I: ").removeprefix(f"{self.script.name}: "):
                on_line(text)

        def build(folder: Path) -> None:
            processes.stream(
                [self.script, "--output", folder / output, *self._argv()],
                log=log,
                what=f"making the {self.kind}",
                env=self._environment(workspace),
                timeout=self.timeout,
                on_line=seen,
                missing=MissingTool.exit_code,
            )

        return workspace.cached(self.kind, digest, build)

    def _argv(self) -> list[str]:
        return [*self.flags, *(str(part) for pair in self.paths for part in pair)]

    @staticmethod
    def _environment(workspace: Workspace) -> dict[str, str]:
        return processes.environment(
            {"AMI_BUILDER_CACHE": str(workspace.cache), "AMI_BUILDER_PYTHON": sys.executable}
        )


def debian_recipe(
    kind: str,
    script: str,
    flags: Sequence[str],
    *,
    arch: Arch,
    mirror: str,
    packages: Sequence[str],
    sources: Sequence[str] = (),
    paths: tuple[tuple[str, Path], ...] = (),
) -> Recipe:
    """Return the recipe of a script that installs Debian packages."""
    scripts = scripts_dir()
    return Recipe(
        kind=kind,
        script=scripts / script,
        flags=(
            *("--arch", arch),
            *flags,
            *(("--mirror", mirror) if mirror else ()),
            *(f for package in packages for f in ("--package", package)),
        ),
        sources=(
            scripts / script,
            scripts / "lib" / "debian.sh",
            scripts / "lib" / f"{kind}-setup.sh",
            *(scripts / s for s in sources),
        ),
        paths=paths,
        timeout=_TIMEOUT if arch.is_native else _EMULATED_TIMEOUT,
    )
