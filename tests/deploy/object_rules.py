"""What Kubernetes itself would hold against our objects, as far as that shows without a cluster."""

import json
from collections.abc import Iterator
from functools import cache

import jsonschema
import kubernetes_validate
from manifests import Object, name, nodes, of_kind, pods

VERSIONS = ("1.30", "1.34", "1.37")
"""The oldest release that deploy/README.md admits (preStop sleep is on from there), one between and the newest."""

SITE_CLAIMS = {"latentd-models"}
"""Volume claims that the cluster's owner makes."""

# The part of the Prometheus Operator's PodMonitor that we use; nothing else is allowed in ours.
POD_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {"type": "object", "required": ["matchLabels"]},
                "podMetricsEndpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["port"],
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                        },
                    },
                },
            },
        },
    },
}

# And of its PrometheusRule.
PROMETHEUS_RULE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PrometheusRule"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["groups"],
            "additionalProperties": False,
            "properties": {
                "groups": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "rules"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "rules": {
                                "type": "array",
                                "minItems": 1,
                                "items": {
                                    "type": "object",
                                    "required": ["alert", "expr", "labels", "annotations"],
                                    "additionalProperties": False,
                                    "properties": {
                                        "alert": {"type": "string", "pattern": "^[A-Z][A-Za-z]+$"},
                                        "expr": {"type": "string"},
                                        "for": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                                        "labels": {"type": "object", "required": ["severity"]},
                                        "annotations": {"type": "object", "required": ["summary", "description"]},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}

_OPERATOR_SCHEMAS = {"PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}

# Fields whose values the API server checks and the published schemas do not, by the end of their path.
ENUMS = {
    ("seccompProfile", "type"): {"RuntimeDefault", "Localhost", "Unconfined"},
    ("strategy", "type"): {"RollingUpdate", "Recreate"},
    ("capabilities", "drop"): {"ALL"},
    ("imagePullPolicy",): {"Always", "IfNotPresent", "Never"},
    ("restartPolicy",): {"Always", "OnFailure", "Never"},
    ("terminationMessagePolicy",): {"File", "FallbackToLogsOnError"},
    ("whenUnsatisfiable",): {"DoNotSchedule", "ScheduleAnyway"},
    ("unhealthyPodEvictionPolicy",): {"AlwaysAllow", "IfHealthyBudget"},
    ("policyTypes",): {"Ingress", "Egress"},
    ("accessModes",): {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    ("fsGroupChangePolicy",): {"OnRootMismatch", "Always"},
    ("tolerations", "operator"): {"Exists", "Equal"},
    ("tolerations", "effect"): {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    ("ports", "protocol"): {"TCP", "UDP", "SCTP"},
    ("appProtocol",): {"kubernetes.io/h2c"},
}


@cache
def _schema_problem(text: str, version: str) -> str | None:
    item = json.loads(text)
    try:
        if schema := _OPERATOR_SCHEMAS.get(item["kind"]):
            jsonschema.validate(item, schema)
        elif kubernetes_validate.validate(item, version, strict=True) != version:
            return f"has no schema for {version}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return error.message
    except jsonschema.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


def schemas(objects: list[Object]) -> Iterator[str]:
    """Every object follows its schema to the letter in each of `VERSIONS`; one without a schema is a finding."""
    for item in objects:
        for version in VERSIONS:
            if problem := _schema_problem(json.dumps(item, sort_keys=True), version):
                yield f"{name(item)} in Kubernetes {version}: {problem}"


def enumerations(objects: list[Object]) -> Iterator[str]:
    """Values that must be one of a few are."""
    for item in objects:
        for path, value in nodes(item):
            allowed = ENUMS.get(path[-1:]) or ENUMS.get(path[-2:])
            if allowed and isinstance(value, str) and value not in allowed:
                yield f"{name(item)} {'.'.join(path)}: {value} is none of {sorted(allowed)}"


def _selects(selector: Object, labels: Object) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def selectors(objects: list[Object]) -> Iterator[str]:
    """What selects pods selects those of the Deployment, and only them."""
    labels = {origin: metadata.get("labels", {}) for origin, metadata, _ in pods(objects)}
    chosen: list[tuple[str, Object]] = []
    for item in objects:
        if item["kind"] == "Service":
            chosen.append((name(item), item["spec"]["selector"]))
        elif item["kind"] in ("PodDisruptionBudget", "PodMonitor", "Deployment"):
            chosen.append((name(item), item["spec"]["selector"]["matchLabels"]))
        elif item["kind"] == "NetworkPolicy":
            chosen.append((name(item), item["spec"]["podSelector"].get("matchLabels", {})))
    for origin, _, spec in pods(objects):
        chosen += [
            (f"{origin} spread", spread.get("labelSelector", {}).get("matchLabels", {}))
            for spread in spec.get("topologySpreadConstraints", [])
        ]
    for origin, selector in chosen:
        found = [pod for pod, own in labels.items() if _selects(selector, own)]
        if len(found) != 1:
            yield f"{origin} selects {found or 'no pod'}"


def references(objects: list[Object]) -> Iterator[str]:
    """Ports, config maps, service accounts and claims that are named exist."""
    ports = {port["name"] for _, _, spec in pods(objects) for c in spec["containers"] for port in c.get("ports", [])}
    known = {kind: {i["metadata"]["name"] for i in of_kind(objects, kind)} for kind in ("ConfigMap", "ServiceAccount")}
    claims = {item["metadata"]["name"] for item in of_kind(objects, "PersistentVolumeClaim")} | SITE_CLAIMS
    for item in objects:
        for path, value in nodes(item):
            match path[-2:]:
                case (_, "targetPort") | ("httpGet" | "podMetricsEndpoints", "port"):
                    allowed = ports
                case ("ports", "port") if item["kind"] == "NetworkPolicy":
                    allowed = ports
                case ("configMapRef", "name"):
                    allowed = known["ConfigMap"]
                case (_, "serviceAccountName"):
                    allowed = known["ServiceAccount"]
                case ("persistentVolumeClaim", "claimName"):
                    allowed = claims
                case _:
                    continue
            if value not in allowed:
                yield f"{name(item)} {'.'.join(path)}: there is no {value}"


def namespaces(objects: list[Object]) -> Iterator[str]:
    """Everything lives in one namespace, which enforces the restricted profile wherever it is declared."""
    for item in objects:
        if item["kind"] == "Namespace":
            if item["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
                yield f"{name(item)} does not enforce the restricted profile"
        elif item["metadata"].get("namespace") != "latentd":
            yield f"{name(item)} is not in the namespace latentd"


RULES = [schemas, enumerations, selectors, references, namespaces]
