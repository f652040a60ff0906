"""Where the manifests repeat what the server decides, the two must agree."""

from collections.abc import Iterator

import latentd
from manifests import Object, of_kind, pods

SPARE_S = 10


def _settings(objects: list[Object]) -> dict[str, str]:
    return {key: value for item in of_kind(objects, "ConfigMap") for key, value in item["data"].items()}


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def ports(objects: list[Object]) -> Iterator[str]:
    """Container ports, probes and services use the ports that the settings tell the server to open."""
    settings = _settings(objects)
    if not settings:
        return
    opened = {
        "grpc": _port(settings["LATENTD_LISTEN"]),
        "health": _port(settings["LATENTD_HEALTH"]),
        "http": _port(settings["LATENTD_HTTP"]),
    }
    for origin, _, spec in pods(objects):
        [container] = spec["containers"]
        declared = {port["name"]: port["containerPort"] for port in container["ports"]}
        if declared != opened:
            yield f"{origin} declares the ports {declared}, the server opens {opened}"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if "grpc" in probe and probe["grpc"]["port"] != opened["health"]:
                yield f"{origin} {kind} asks port {probe['grpc']['port']}, health answers on {opened['health']}"
    for service in of_kind(objects, "Service"):
        if service["spec"]["ports"][0]["port"] != opened["grpc"]:
            yield f"{service['metadata']['name']} serves another port than {opened['grpc']}"


def images(objects: list[Object]) -> Iterator[str]:
    """The image carries this version, and the flavour fits the device."""
    device = _settings(objects).get("LATENTD_DEVICE")
    for origin, _, spec in pods(objects):
        [container] = spec["containers"]
        on_gpu = "nvidia.com/gpu" in container["resources"].get("limits", {})
        expected = f"latentd-server:{latentd.__version__}{'-gpu' if on_gpu else ''}"
        if container["image"] != expected:
            yield f"{origin} runs {container['image']}, not {expected}"
        if device and device.startswith("cuda") != on_gpu:
            yield f"{origin} has {'a' if on_gpu else 'no'} GPU and the device {device}"


RULES = [ports, images]
MAIN = "spec.template.spec.containers.0"
PLANTED = [
    ("ConfigMap", "data.LATENTD_LISTEN", "0.0.0.0:8600", "declares the ports"),
    ("Deployment", f"{MAIN}.ports.2.containerPort", 9091, "declares the ports"),
    ("Deployment", f"{MAIN}.readinessProbe.grpc.port", 8500, "readinessProbe asks port 8500"),
    ("Service", "spec.ports.0.port", 80, "serves another port"),
    ("Deployment", f"{MAIN}.image", "latentd-server:0.0.1", "runs latentd-server:0.0.1"),
    ("Deployment", f"{MAIN}.resources.limits", {"memory": "1Gi", "nvidia.com/gpu": 1}, "has a GPU and the device cpu"),
    ("ConfigMap", "data.LATENTD_DEVICE", "cuda:0", "has no GPU and the device cuda:0"),
]
