"""Ask the scheduler to retire the Dask workers of this machine. Runs as retire_workers.py starts it.

Python 3.9 and later, with the packages and the settings of the Dask process whose workers retire.

Argument: JSON with
  seconds     the most that it may take
  addresses   this machine's, without loopback
  boot        the id of this machine's boot; empty: a worker is known by its address alone
  spec        whether the process runs `dask spec`, and not `dask worker`
  words       what follows that on its command line
Exit status: 0 if no worker of this machine is left, 1 if one is, 3 if the scheduler runs on this machine.
"""

from __future__ import annotations

import asyncio
import functools
import json
import linecache
import logging
import os
import re
import socket
import sys
from typing import Any

import dask.config
from distributed import Client
from distributed.cli import dask_spec, dask_worker
from distributed.security import Security

PAUSE = 5.0
CONNECT = 10.0
SCHEDULER_IS_HERE = 3
LOOPBACK = {"127.0.0.1", "::1"}
BOOT_ID = "/proc/sys/kernel/random/boot_id"
NETWORK = "/proc/self/ns/net"
ADDRESSES = (re.compile(r"[a-z][a-z0-9+]*://\S+"), re.compile(r"\S+:[0-9]{2,5}/?"), re.compile(r"[^-]\S*"))
"""What a scheduler's address looks like, the surest first; a port may be missing."""


def say(priority: int, text: str) -> None:
    """Log a line; systemd reads the priority in the angle brackets."""
    print(f"<{priority}>retire-workers: {text}", flush=True)


def host_of(address: str) -> str:
    """Return the host in the address of a Dask process, such as tls://10.0.0.7:8786."""
    where = address.rpartition("://")[2].rstrip("/")
    if where.startswith("["):
        return where[1:].partition("]")[0]
    return where.rpartition(":")[0] or where


@functools.cache
def addresses_of(host: str) -> frozenset[str]:
    """Return the IP addresses of a host's name; an address is its own."""
    try:
        return frozenset(str(found[4][0]) for found in socket.getaddrinfo(host, None))
    except OSError:
        return frozenset([host])


def address_in(parsed: dict[str, Any]) -> str | None:
    """Return the scheduler's address among the arguments of a command.

    `dask cuda worker` has options that the command of `dask worker` does not know and takes for arguments.
    """
    # An argument that is not there has a value of its own kind.
    values = [parsed.get(name) for name in ("scheduler", "args", "preload_argv")]
    lists = [[value] if isinstance(value, str) else value for value in values]
    words = [word for each in lists if isinstance(each, (list, tuple)) for word in each]
    if words and not words[0].startswith("-"):
        return words[0]
    return next((word for like in ADDRESSES for word in words if like.fullmatch(word)), None)


def client_arguments(words: list[str], *, spec: bool) -> dict[str, Any]:
    """Return what a client needs to connect to the scheduler of a worker with this command line."""
    command = dask_spec.main if spec else dask_worker.main
    context = command.make_context(command.name, list(words), resilient_parsing=True)
    found = context.params
    # A client's certificate may be missing from a worker's settings; one from its CA is what counts.
    tls = {
        "tls_ca_file": found.get("tls_ca_file"),
        "tls_client_cert": found.get("tls_cert"),
        "tls_client_key": found.get("tls_key"),
    }
    security = Security(**{name: value for name, value in tls.items() if value})
    for part in ("cert", "key"):
        own = getattr(security, f"tls_client_{part}") or getattr(security, f"tls_worker_{part}")
        setattr(security, f"tls_client_{part}", own)
    if found.get("scheduler_file"):
        return {"scheduler_file": found["scheduler_file"], "security": security}
    address = address_in(command.make_parser(context).parse_args(list(words))[0])
    address = address or dask.config.get("scheduler-address", None)
    if not address:
        # A client without an address would start a cluster of its own.
        raise SystemExit(
            "<3>retire-workers: a Dask process whose command line names no scheduler can't be retired"
        )
    return {"address": address, "security": security}


class Retirement:
    """The workers of one scheduler that run on this machine."""

    def __init__(self, client: dict[str, Any], addresses: set[str], boot: str) -> None:
        self.client = client
        self.addresses = addresses
        self.boot = boot
        self.any_retired = False
        self.problem = "the scheduler does not answer"

    async def run(self) -> int:
        """Retire until no worker is left, and return the exit status. Does not give up."""
        while True:
            try:
                async with Client(
                    **self.client, asynchronous=True, set_as_default=False, timeout=CONNECT
                ) as client:
                    return await self._retire(client)
            except (OSError, asyncio.TimeoutError) as error:
                self.problem = f"the scheduler does not answer: {error}"
                await asyncio.sleep(PAUSE)

    async def _retire(self, client: Any) -> int:
        host = host_of(client.scheduler.address)
        if addresses_of(host) & (self.addresses | LOOPBACK):
            say(4, f"the scheduler {client.scheduler.address} runs on this machine; it can't be moved")
            return SCHEDULER_IS_HERE
        while True:
            everyone = list(await client.nthreads())
            workers = [each for each in everyone if addresses_of(host_of(each)) & self.addresses]
            if not workers and not self.any_retired:
                workers = await self._by_boot(client, everyone)
            if not workers:
                say(5, f"no worker of this machine is left at the scheduler {client.scheduler.address}")
                return 0
            self.problem = f"the data of {' '.join(workers)} is still being moved"
            say(6, f"retiring {' '.join(workers)}")
            retired = await client.retire_workers(workers=workers, close_workers=True)
            self.any_retired = self.any_retired or bool(retired)
            for worker in retired:
                say(5, f"{worker} has retired: other workers have its data")
            if len(retired) < len(workers):
                left = " ".join(worker for worker in workers if worker not in retired)
                self.problem = f"no other worker takes the data of {left}, or an actor is there"
                await asyncio.sleep(PAUSE)

    async def _by_boot(self, client: Any, workers: list[str]) -> list[str]:
        """Return the workers of this machine and network, of those that may advertise another address."""
        if not self.boot or not workers:
            return []
        boots = await self._answers(client, workers, linecache.getline, BOOT_ID, 1)
        here = [worker for worker, boot in boots.items() if str(boot).strip() == self.boot]
        # Workers of another container on this machine retire with their own process.
        there = await self._answers(client, here, os.readlink, NETWORK) if here else {}
        return [worker for worker, answer in there.items() if answer == os.readlink(NETWORK)]

    @staticmethod
    async def _answers(client: Any, workers: list[str], function: Any, *arguments: Any) -> dict[str, Any]:
        """Return what a function of the standard library returns on the workers that answer in time."""
        asked = client.run(function, *arguments, workers=workers, on_error="return")
        try:
            return await asyncio.wait_for(asked, CONNECT)
        except asyncio.TimeoutError:
            return {}


async def main(seconds: float, addresses: list[str], words: list[str], *, spec: bool, boot: str = "") -> int:
    """Retire this machine's workers, and return the exit status."""
    retirement = Retirement(client_arguments(words, spec=spec), set(addresses), boot)
    try:
        return await asyncio.wait_for(retirement.run(), seconds)
    except asyncio.TimeoutError:  # another one before Python 3.11
        say(3, f"not retired within {seconds:.0f} s: {retirement.problem}")
        return 1


if __name__ == "__main__":
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    sys.exit(asyncio.run(main(**json.loads(sys.argv[1]))))
