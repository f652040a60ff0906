"""Where the manifests repeat what the server decides, the two must agree."""

import re
from collections.abc import Iterator

import latentd
from latentd_server.config import ENVIRONMENT_PREFIX, Config, ConfigError, read
from latentd_server.health import LIVENESS
from latentd_server.metrics import Metrics
from manifests import Object, of_kind, pods

SPARE_S = 10
"""What a pod's grace period leaves over the preStop sleep and the drain."""


def configured(settings: dict[str, str]) -> Config:
    """The server's reading of these variables, on a machine where the directory of models exists."""
    return read([], {**settings, "LATENTD_MODELS": "."})


def _settings(objects: list[Object]) -> dict[str, str]:
    return {key: value for item in of_kind(objects, "ConfigMap") for key, value in item["data"].items()}


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def settings(objects: list[Object]) -> Iterator[str]:
    """Every variable is a setting, with a value that the server accepts, and the default ports are kept."""
    variables = _settings(objects)
    if not variables:
        return
    for variable in variables:
        if variable.removeprefix(ENVIRONMENT_PREFIX).lower() not in Config.model_fields:
            yield f"{variable} is no setting of the server"
    try:
        config = configured(variables)
    except ConfigError as error:
        yield from error.problems
        return
    for key in ("listen", "http"):
        default = Config.model_fields[key].default
        if _port(getattr(config, key)) != _port(default):
            yield f"{key} is {getattr(config, key)}, elsewhere the port of {default} is documented"
    for origin, _, spec in pods(objects):
        [container] = spec["containers"]
        limit = container["resources"].get("limits", {}).get("cpu")
        if str(config.threads) != limit:
            yield f"{origin} computes on {config.threads} threads with {limit} CPUs"
        if variables["LATENTD_MODELS"] not in [mount["mountPath"] for mount in container["volumeMounts"]]:
            yield f"{origin} mounts no models at {variables['LATENTD_MODELS']}"


def grace(objects: list[Object]) -> Iterator[str]:
    """A pod is given the time to leave its Services and to finish what it accepted."""
    variables = _settings(objects)
    for origin, _, spec in pods(objects):
        if not variables:
            continue
        sleep = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = float(variables.get("LATENTD_DRAIN_SECONDS", Config.model_fields["drain_seconds"].default))
        if sleep < 5:
            yield f"{origin} stops before proxies can know; its preStop sleep is {sleep} s"
        if spec.get("terminationGracePeriodSeconds", 30) < sleep + drain + SPARE_S:
            yield f"{origin} is killed before {sleep} s of sleep, {drain:g} s of drain and {SPARE_S} s are over"


def probes(objects: list[Object]) -> Iterator[str]:
    """Readiness asks whether the server serves, liveness only whether it lives, or load would end in kills."""
    asked = {"startupProbe": "", "readinessProbe": "", "livenessProbe": LIVENESS}
    for origin, _, spec in pods(objects):
        for container in spec["containers"]:
            for kind, service in asked.items() if "ports" in container else ():
                probe = container.get(kind, {})
                if probe.get("grpc", {}).get("service", "") != service or "grpc" not in probe:
                    yield f"{origin} {kind} does not ask gRPC health for {service!r}"


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
            port = container.get(kind, {}).get("grpc", {}).get("port")
            if port != opened["health"]:
                yield f"{origin} {kind} asks port {port}, health answers on {opened['health']}"
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


def alerts(objects: list[Object]) -> Iterator[str]:
    """Alerts are about series that the server has, by labels that they have."""
    metrics = Metrics()
    metrics.self_checked("m@1", "mismatch")
    known = {sample.name: sample.labels.keys() for family in metrics.registry.collect() for sample in family.samples}
    for item in of_kind(objects, "PrometheusRule"):
        for rule in (rule for group in item["spec"]["groups"] for rule in group["rules"]):
            for series, matchers in re.findall(r"(latentd_\w+)(?:{([^}]*)})?", rule["expr"]):
                if series not in known:
                    yield f"{rule['alert']}: the server has no series {series}"
                    continue
                for label in re.findall(r"(\w+)\s*[=!~]+", matchers):
                    if label not in known[series]:
                        yield f"{rule['alert']}: {series} has no label {label}"


RULES = [settings, grace, probes, ports, images, alerts]
POD = "spec.template.spec"
MAIN = f"{POD}.containers.0"
EXPRESSION = "spec.groups.0.rules.0.expr"
# As in test_manifests.py: kind, path, new value, complaint.
PLANTED = [
    ("ConfigMap", "data.LATENTD_MODLES", "/models", "LATENTD_MODLES is no setting of the server"),
    ("ConfigMap", "data.LATENTD_DEVICE", "gpu", "LATENTD_DEVICE: must be auto, cpu or cuda:N"),
    ("ConfigMap", "data.LATENTD_HTTP", "9090", "LATENTD_HTTP: must be HOST:PORT"),
    ("ConfigMap", "data.LATENTD_HTTP", "0.0.0.0:9091", "elsewhere the port of 127.0.0.1:9090 is documented"),
    ("ConfigMap", "data.LATENTD_THREADS", "8", "computes on 8 threads with 2 CPUs"),
    ("ConfigMap", "data.LATENTD_MODELS", "/bundles", "mounts no models at /bundles"),
    ("ConfigMap", "data.LATENTD_DRAIN_SECONDS", "300", "300 s of drain"),
    ("Deployment", f"{POD}.terminationGracePeriodSeconds", 60, "is killed before"),
    ("Deployment", f"{MAIN}.lifecycle", {}, "stops before proxies can know"),
    ("Deployment", f"{MAIN}.livenessProbe", {"grpc": {"port": 8501}}, "livenessProbe does not ask gRPC health for"),
    ("Deployment", f"{MAIN}.readinessProbe", {"httpGet": {"port": "http"}}, "readinessProbe does not ask gRPC health"),
    ("Deployment", f"{MAIN}.startupProbe.grpc.service", "ready", "startupProbe does not ask gRPC health for ''"),
    ("ConfigMap", "data.LATENTD_LISTEN", "0.0.0.0:8600", "declares the ports"),
    ("Deployment", f"{MAIN}.ports.2.containerPort", 9091, "declares the ports"),
    ("Deployment", f"{MAIN}.readinessProbe.grpc.port", 8500, "readinessProbe asks port 8500"),
    ("Service", "spec.ports.0.port", 80, "serves another port"),
    ("Deployment", f"{MAIN}.image", "latentd-server:0.0.1", "runs latentd-server:0.0.1"),
    (
        "Deployment",
        f"{MAIN}.resources.limits",
        {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": 1},
        "has a GPU and the device cpu",
    ),
    ("PrometheusRule", EXPRESSION, "latentd_self_check_total > 0", "the server has no series latentd_self_check_total"),
    ("PrometheusRule", EXPRESSION, 'latentd_self_checks_total{reslt="a"} > 0', "has no label reslt"),
    ("ConfigMap", "data.LATENTD_DEVICE", "cuda:0", "has no GPU and the device cuda:0"),
]
