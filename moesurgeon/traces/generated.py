"""Synthetic text with rules to learn: arithmetic, JSON records and logs.

Document number i of a domain is a pure function of its key (``random.Random`` seeds strings through
SHA-512, the same on every machine), so any split can be made at any size, anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from moesurgeon.traces.documents import Document, Split, in_split

_DOCUMENTS = 6000
_NAMES = ("anna", "bruno", "chen", "dora", "emeka", "farah", "goran", "hana", "ivan", "jia",
          "kofi", "lena", "marco", "nadia", "omar", "petra")  # fmt: skip
_THINGS = ("apples", "books", "coins", "nails", "pens", "stamps", "tickets", "tiles")
_SERVICES = ("auth", "billing", "cache", "gateway", "mailer", "orders", "search", "storage")
_PATHS = ("/", "/login", "/api/v1/users", "/api/v1/orders", "/static/app.js", "/health", "/search")
_AGENTS = ("curl/8.5.0", "Mozilla/5.0", "python-requests/2.31.0", "Go-http-client/1.1")


def arithmetic_documents(split: Split) -> Iterator[Document]:
    """Yield sums, products, comparisons, sequences and small word problems, worked out."""
    return _documents("arithmetic", split, _arithmetic_line, lines=45)


def json_documents(split: Split) -> Iterator[Document]:
    """Yield nested JSON records of a few recurring shapes."""
    return _documents("json", split, _json_record, lines=5)


def log_documents(split: Split) -> Iterator[Document]:
    """Yield web access logs, service logs and system logs, each document of one kind."""
    return _documents("logs", split, _log_line, lines=22)


def _documents(domain: str, split: Split, line: Callable[[Random, int], str], *, lines: int) -> Iterator[Document]:
    for number in range(_DOCUMENTS):
        key = f"{domain}:{number}"
        if not in_split(key, split):
            continue
        rng = Random(key)
        kind = rng.randrange(1 << 16)
        yield Document(key, "\n".join(line(rng, kind) for _ in range(lines)) + "\n")


def _arithmetic_line(rng: Random, kind: int) -> str:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    match rng.randrange(8):
        case 0:
            return f"{a} + {b} = {a + b}"
        case 1:
            return f"{a + b} - {b} = {a}"
        case 2:
            return f"{a} * {c} = {a * c}"
        case 3:
            return f"{a * c} / {c} = {a}"
        case 4:
            return f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}"
        case 5:
            sign = "<" if a < b else ">" if a > b else "="
            return f"{a} {sign} {b}"
        case 6:
            return "sequence: " + ", ".join(str(a + c * i) for i in range(7))
        case _:
            name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
            return (
                f"{name} has {a} {thing} and buys {c} boxes of {b}. "
                f"{c} * {b} = {c * b}, {a} + {c * b} = {a + c * b}. answer: {a + c * b}"
            )


def _json_record(rng: Random, kind: int) -> str:
    record: dict[str, Any]
    match kind % 4:
        case 0:
            items: list[dict[str, Any]] = [
                {"sku": f"{rng.choice(_THINGS)[:3].upper()}-{rng.randint(100, 999)}",
                 "quantity": rng.randint(1, 9), "price": round(rng.uniform(1, 99), 2)}
                for _ in range(rng.randint(1, 3))
            ]  # fmt: skip
            total = round(sum(item["quantity"] * item["price"] for item in items), 2)
            record = {"order": rng.randint(10000, 99999), "customer": _person(rng), "items": items,
                      "total": total, "paid": rng.random() < 0.7}  # fmt: skip
        case 1:
            record = {"user": _person(rng), "roles": rng.sample(["admin", "editor", "reader"], 2),
                      "settings": {"theme": rng.choice(["dark", "light"]), "page_size": rng.choice([10, 20, 50]),
                                   "notifications": {"email": rng.random() < 0.5, "sms": False}}}  # fmt: skip
        case 2:
            record = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [
                round(rng.uniform(-180, 180), 4), round(rng.uniform(-90, 90), 4)]},
                "properties": {"name": rng.choice(_NAMES).title(), "elevation": rng.randint(0, 3000)}}  # fmt: skip
        case _:
            record = {"service": rng.choice(_SERVICES), "version": f"{rng.randint(0, 5)}.{rng.randint(0, 20)}.0",
                      "replicas": rng.randint(1, 8), "ports": sorted(rng.sample(range(8000, 8100), 2)),
                      "env": {"LOG_LEVEL": rng.choice(["debug", "info", "warning"]), "TIMEOUT_MS": rng.choice([250, 500, 1000])}}  # fmt: skip
    return json.dumps(record, indent=2 if kind & 4 else None)


def _person(rng: Random) -> dict[str, Any]:
    name = rng.choice(_NAMES)
    return {"id": rng.randint(1, 9999), "name": name.title(), "email": f"{name}@example.org"}


def _log_line(rng: Random, kind: int) -> str:
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"
    day = 1 + kind % 28
    address = f"10.{kind % 8}.{rng.randint(0, 3)}.{rng.randint(1, 254)}"
    match kind % 3:
        case 0:
            status = rng.choice([200, 200, 200, 200, 301, 304, 404, 500])
            verb = rng.choice(["GET", "GET", "GET", "POST"])
            return (
                f'{address} - - [{day:02d}/Nov/2025:{clock} +0000] "{verb} {rng.choice(_PATHS)} HTTP/1.1" '
                f'{status} {rng.randint(100, 99999)} "-" "{rng.choice(_AGENTS)}"'
            )
        case 1:
            level = rng.choice(["DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR"])
            service = rng.choice(_SERVICES)
            message = {
                "DEBUG": f"cache lookup key={service}:{rng.randint(1, 999)} hit={rng.choice(['true', 'false'])}",
                "INFO": f"request finished status=200 duration={rng.randint(1, 900)}ms user={rng.choice(_NAMES)}",
                "WARNING": f"slow query took {rng.randint(1000, 9000)}ms, retrying in {rng.choice([1, 2, 4])}s",
                "ERROR": f"connection to {address}:5432 refused after {rng.randint(1, 5)} attempts",
            }[level]
            return f"2025-11-{day:02d} {clock},{rng.randint(0, 999):03d} {level:<7} [{service}] {message}"
        case _:
            pid = rng.randint(300, 9999)
            message = rng.choice([
                f"sshd[{pid}]: Accepted publickey for {rng.choice(_NAMES)} from {address} port {rng.randint(30000, 60000)} ssh2",
                f"systemd[1]: Started session {rng.randint(1, 999)} of user {rng.choice(_NAMES)}.",
                f"kernel: [{rng.randint(1000, 99999)}.{rng.randint(0, 999999):06d}] eth0: link up, 1000 Mbps, full duplex",
                f"cron[{pid}]: (root) CMD (run-parts /etc/cron.hourly)",
            ])  # fmt: skip
            return f"Nov {day:2d} {clock} host-{kind % 16:02d} {message}"
