"""What a pod of ours must be: the Pod Security Standards' restricted profile, and good manners beyond it.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from collections.abc import Iterator

from manifests import Object, containers, pods

RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SECCOMP = ("RuntimeDefault", "Localhost")


def restricted_profile(objects: list[Object]) -> Iterator[str]:
    """The restricted profile, with the values it allows spelled out (schemas do not check them)."""
    for origin, _, spec in pods(objects):
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{origin} sets {key}"
        for volume in spec.get("volumes", []):
            kind = next(key for key in volume if key != "name")
            if kind not in RESTRICTED_VOLUMES:
                yield f"{origin} mounts a {kind} volume"
        whole = spec.get("securityContext", {})
        if whole.get("sysctls"):
            yield f"{origin} sets sysctls"
        for container in containers(spec):
            where = f"{origin}, container {container['name']}"
            own = container.get("securityContext", {})
            both = {**whole, **own}
            if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
                yield f"{where} may run as root"
            if both.get("seccompProfile", {}).get("type") not in SECCOMP:
                yield f"{where} has no seccomp profile of {SECCOMP}"
            if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
                yield f"{where} may gain privileges"
            if "ALL" not in own.get("capabilities", {}).get("drop", []) or own["capabilities"].get("add"):
                yield f"{where} keeps capabilities"
            if own.get("procMount", "Default") != "Default" or both.get("seLinuxOptions") or both.get("windowsOptions"):
                yield f"{where} changes its confinement"
            if any(port.get("hostPort") for port in container.get("ports", [])):
                yield f"{where} takes a port of its node"


def good_manners(objects: list[Object]) -> Iterator[str]:
    """Read-only, bounded, without credentials it does not use, and from an image that is named exactly."""
    for origin, _, spec in pods(objects):
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{origin} carries a token of the Kubernetes API"
        if spec.get("enableServiceLinks") is not False:
            yield f"{origin} has service links, whose LATENTD_* variables look like settings"
        if not isinstance(spec["securityContext"].get("runAsUser"), int):
            yield f"{origin} does not say which user it runs as"
        for container in containers(spec):
            where = f"{origin}, container {container['name']}"
            if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
                yield f"{where} has a writable root file system"
            resources = container.get("resources", {})
            if not {"cpu", "memory"} <= resources.get("requests", {}).keys():
                yield f"{where} does not request CPU and memory"
            if "memory" not in resources.get("limits", {}):
                yield f"{where} has no memory limit"
            image, _, tag = container["image"].partition("@")[0].rpartition(":")
            if not image or tag == "latest":
                yield f"{where} runs {container['image']}, which names no version"
        mounts = [m for c in containers(spec) for m in c.get("volumeMounts", []) if m["name"] == "models"]
        if "loader" not in origin and not all(mount.get("readOnly") for mount in mounts):
            yield f"{origin} may write to the models"


RULES = [restricted_profile, good_manners]
