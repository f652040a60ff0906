"""Rendered Kubernetes objects, and how to find things in them."""

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy/k8s"

Object = dict[str, Any]


@cache
def render_text(target: str) -> str:
    """What `kubectl kustomize` makes of a directory below deploy/k8s."""
    return subprocess.run(
        ["kubectl", "kustomize", str(K8S / target)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def render(target: str) -> list[Object]:
    """The objects of one directory below deploy/k8s; fresh ones at every call, free to be changed."""
    return list(yaml.safe_load_all(render_text(target)))


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    """The objects of one kind."""
    return [item for item in objects if item["kind"] == kind]


def name(item: Object) -> str:
    """KIND/NAME, for messages."""
    return f"{item['kind']}/{item['metadata']['name']}"


def pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Where each pod comes from, its metadata and its spec."""
    for item in objects:
        if item["kind"] == "Pod":
            yield name(item), item["metadata"], item["spec"]
        elif "template" in item.get("spec", {}):
            yield name(item), item["spec"]["template"]["metadata"], item["spec"]["template"]["spec"]


def containers(spec: Object) -> list[Object]:
    """Every container of a pod, those of its start and of its debugging included."""
    return [c for kind in ("containers", "initContainers", "ephemeralContainers") for c in spec.get(kind) or []]


def nodes(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value inside an object with its path; list items have the path of their list."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from nodes(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner, path)
