import shutil
from typing import Any

import object_rules
import pod_rules
import pytest
import server_rules
from manifests import Object, of_kind, render

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="rendering needs kubectl")

TARGETS = ["base", "overlays/dev-cpu", "overlays/prod-gpu", "loader"]
RULES = [*pod_rules.RULES, *object_rules.RULES, *server_rules.RULES]
ABSENT = object()

POD = "spec.template.spec"
MAIN = f"{POD}.containers.0"

# Each row breaks the rendered base (or the overlay named) in one place: the kind of the object, the path of the field,
# its new value, and a part of what the rules must say.
PLANTED = [
    # schemas
    ("Deployment", "spec.replicas", "two", "in Kubernetes 1.34: spec.replicas"),
    ("Deployment", f"{MAIN}.readinesProbe", {}, "'readinesProbe' was unexpected"),
    ("PodDisruptionBudget", "apiVersion", "policy/v1beta1", "Couldn't find schema for kind PodDisruptionBudget"),
    ("Service", "kind", "Servise", "Couldn't find schema for kind Servise"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.prot", "http", "'prot' was unexpected"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.port", 9090, "is not of type 'string'"),
    ("PrometheusRule", "spec.groups.0.rules.0.for", "soon", "'soon' does not match"),
    ("PrometheusRule", "spec.groups.0.rules.0.labels", {}, "'severity' is a required property"),
    # values that schemas leave open
    ("Deployment", f"{POD}.securityContext.seccompProfile.type", "RuntimeDefaullt", "RuntimeDefaullt is none of"),
    ("Deployment", "spec.strategy.type", "Rolling", "Rolling is none of"),
    ("NetworkPolicy", "spec.policyTypes.0", "ingress", "ingress is none of"),
    ("Service", "spec.ports.0.appProtocol", "h2c", "h2c is none of"),
    # the restricted profile
    ("Deployment", f"{POD}.hostNetwork", True, "sets hostNetwork"),
    ("Deployment", f"{POD}.volumes.0", {"name": "models", "hostPath": {"path": "/"}}, "mounts a hostPath volume"),
    ("Deployment", f"{POD}.securityContext.sysctls", [{"name": "a", "value": "1"}], "sets sysctls"),
    ("Deployment", f"{POD}.securityContext.runAsNonRoot", ABSENT, "may run as root"),
    ("Deployment", f"{MAIN}.securityContext.runAsUser", 0, "may run as root"),
    ("Deployment", f"{POD}.securityContext.seccompProfile", ABSENT, "has no seccomp profile"),
    ("Deployment", f"{MAIN}.securityContext.seccompProfile", {"type": "Unconfined"}, "has no seccomp profile"),
    ("Deployment", f"{MAIN}.securityContext.privileged", True, "may gain privileges"),
    ("Deployment", f"{MAIN}.securityContext.allowPrivilegeEscalation", ABSENT, "may gain privileges"),
    ("Deployment", f"{MAIN}.securityContext.capabilities.drop.0", "NET_RAW", "keeps capabilities"),
    ("Deployment", f"{MAIN}.securityContext.capabilities.add", ["SYS_ADMIN"], "keeps capabilities"),
    ("Deployment", f"{MAIN}.securityContext.procMount", "Unmasked", "changes its confinement"),
    ("Deployment", f"{MAIN}.ports.0.hostPort", 8500, "takes a port of its node"),
    ("Deployment", f"{POD}.initContainers", [{"name": "fix", "image": "fix:1"}], "container fix may gain"),
    ("Namespace", "metadata.labels", {}, "does not enforce the restricted profile"),
    # good manners
    ("Deployment", f"{POD}.automountServiceAccountToken", True, "carries a token"),
    ("Deployment", f"{POD}.enableServiceLinks", ABSENT, "has service links"),
    ("Deployment", f"{POD}.securityContext.runAsUser", ABSENT, "does not say which user"),
    ("Deployment", f"{MAIN}.securityContext.readOnlyRootFilesystem", False, "writable root file system"),
    ("Deployment", f"{MAIN}.resources.requests", {"memory": "1Gi"}, "does not request CPU"),
    ("Deployment", f"{MAIN}.resources.limits", ABSENT, "has no memory limit"),
    ("Deployment", f"{MAIN}.image", "latentd-server:latest", "names no version"),
    ("Deployment", f"{MAIN}.image", "latentd-server", "names no version"),
    ("Deployment", f"{MAIN}.volumeMounts.0.readOnly", ABSENT, "may write to the models"),
    # what points at what
    ("Deployment", "spec.template.metadata.labels", {"app": "other"}, "Service/latentd selects no pod"),
    ("Service", "spec.selector", {}, "Service/latentd selects no pod"),
    ("PodDisruptionBudget", "spec.selector.matchLabels", {"app": "x"}, "PodDisruptionBudget/latentd selects no pod"),
    ("NetworkPolicy", "spec.podSelector", {}, "NetworkPolicy/latentd selects no pod"),
    ("PodMonitor", "spec.selector.matchLabels", {"app": "x"}, "PodMonitor/latentd selects no pod"),
    ("Deployment", f"{POD}.topologySpreadConstraints.0.labelSelector", ABSENT, "spread selects no pod"),
    ("Service", "spec.ports.0.targetPort", "grcp", "there is no grcp"),
    ("NetworkPolicy", "spec.ingress.0.ports.0.port", "grcp", "there is no grcp"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.port", "metrics", "there is no metrics"),
    ("Deployment", f"{MAIN}.livenessProbe", {"httpGet": {"port": "web"}}, "there is no web"),
    ("Deployment", f"{MAIN}.envFrom.0.configMapRef.name", "latentd", "there is no latentd"),
    ("Deployment", f"{POD}.serviceAccountName", "default", "there is no default"),
    ("Deployment", f"{POD}.volumes.0.persistentVolumeClaim.claimName", "modles", "there is no modles"),
    ("Service", "metadata.namespace", "default", "is not in the namespace latentd"),
]


def break_at(objects: list[Object], kind: str, path: str, value: Any) -> None:
    """Put `value` at `path` of the first object of this kind, or take away what is there."""
    place: Any = of_kind(objects, kind)[0]
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    for key in parents:
        place = place[key]
    if value is ABSENT:
        del place[last]
    else:
        assert isinstance(place, list) or place.get(last) != value
        place[last] = value


def findings(objects: list[Object]) -> list[str]:
    """All that the rules have against these objects."""
    return [finding for rule in RULES for finding in rule(objects)]


@pytest.mark.parametrize("target", TARGETS)
def test_what_we_ship_keeps_every_rule(target: str) -> None:
    """Each directory renders to valid, restricted, consistent objects that agree with the server's own defaults."""
    assert findings(render(target)) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "complaint"),
    [*PLANTED, *server_rules.PLANTED],
    ids=lambda part: part if isinstance(part, str) and " " in part else "",
)
def test_a_planted_error_is_found(kind: str, path: str, value: Any, complaint: str) -> None:
    """No rule is blind: each catches the error it is there for."""
    objects = render("base")
    break_at(objects, kind, path, value)
    found = findings(objects)
    assert any(complaint in finding for finding in found), found


def test_the_gpu_component_changes_image_device_and_rollout() -> None:
    """A GPU pod takes one GPU, runs the GPU image on it alone, and is never surged."""
    [deployment] = of_kind(render("overlays/prod-gpu"), "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-gpu")
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_a_changed_setting_rolls_the_pods() -> None:
    """Settings reach pods by a config map whose name depends on its content."""
    names = {target: of_kind(render(target), "ConfigMap")[0]["metadata"]["name"] for target in TARGETS[:3]}
    assert names["base"] == names["overlays/dev-cpu"] != names["overlays/prod-gpu"]
