"""What deploy/ holds is what its tools take, and fits the server: settings, addresses, names of figures."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bdh.cli.serve import parsed_config
from bdh.inference.stats import EngineStats
from bdh.serving.auth.host_check import HostCheck
from bdh.serving.config import ServeConfig, validate
from bdh.serving.observability.metrics import Metrics
from tests.deploy.dockerfile import ROOT, command, environment_of, stages, whole
from tests.deploy.nginx import CONF, NGINX, adapted

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/bdh.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
TARGETS = ("cpu", "cuda")


def check(*argv: object) -> None:
    """Runs a checker, which has nothing to say."""
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def objects() -> dict[str, Any]:
    """Kubernetes' objects by their kinds; claims of storage with their names."""
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    claim = "PersistentVolumeClaim"
    return {one["kind"] if one["kind"] != claim else f"{claim} {one['metadata']['name']}": one for one in found}


# ---------------------------------------------------------------------------------------------------------- the image


def test_the_dockerfile_passes_its_linter() -> None:
    check(BIN / "hadolint", "--failure-threshold", "style", DEPLOY / "Dockerfile")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_bdh_serve_without_rights(target: str) -> None:
    stage = whole(target)
    assert re.fullmatch(r"[\w/.-]+:\d[\w.-]+", stage.base)  # a version, never "latest"
    assert command(stage.last("ENTRYPOINT")) == ["bdh", "serve"]
    assert command(stage.last("CMD")) == ["--model", "bdh=/models/bdh"]
    user, group = stage.last("USER").split(":")
    assert int(user) > 0 and int(group) > 0
    health = command(stage.last("HEALTHCHECK").partition(" CMD ")[2])
    assert health[0] == "python" and "/health/ready" in health[2]
    assert environment_of(stage)["BDH_SERVE__HOST"] == "0.0.0.0"
    assert [step.value for step in stage.steps if step.instruction == "COPY"] == [
        f"--from=packages-{target} /opt/venv /opt/venv"
    ]


def test_the_image_gets_what_it_is_made_of_and_nothing_else() -> None:
    copied = {
        source
        for stage in stages().values()
        for step in stage.steps
        if step.instruction == "COPY" and "--from" not in step.value
        for source in step.value.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied


# -------------------------------------------------------------------------------------------------------- compose.yaml


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_match_the_specification(name: str) -> None:
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name)


def test_compose_opens_nothing_to_the_network_and_mounts_what_there_is() -> None:
    services = COMPOSE["services"]
    assert {name: one["profiles"] for name, one in services.items() if "profiles" in one} == {
        "bdh-2": ["nginx"],
        "nginx": ["nginx"],
        "redis": ["redis"],
    }
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        if not service["image"].startswith("bdh:"):
            assert re.fullmatch(r"[\w/-]+:v?\d[\w.-]+", service["image"]), name
            assert "healthcheck" in service, name
        for volume in service.get("volumes", []):
            if isinstance(volume, str) and volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert (DEPLOY / source).exists() and mode == "ro", volume
    for name in ("bdh", "bdh-2"):
        model, sessions = services[name]["volumes"]
        assert sessions == "sessions:/data"
        assert model["read_only"] and model["target"] == "/models/bdh"
        assert services[name]["read_only"]
    assert set(yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())["services"]) == {"bdh", "bdh-2"}


def test_the_settings_of_images_and_compose_are_the_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {**environment_of(whole("cpu")), **COMPOSE["services"]["bdh"]["environment"]}
    settings = {name: value for name, value in given.items() if name.startswith("BDH_SERVE__")}
    for name, value in settings.items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    config = parsed_config(command(whole("cpu").last("CMD")))
    validate(config)
    assert (config.host, config.port) == ("0.0.0.0", 8000)
    assert (config.logging.format, config.trusted_proxies, config.allowed_hosts) == ("json", ["*"], [])
    assert [(model.name, model.path) for model in config.models] == [("bdh", "/models/bdh")]
    grace = int(COMPOSE["services"]["bdh"]["stop_grace_period"].removesuffix("s"))
    assert grace > config.drain_seconds + 3


def test_compose_hands_on_settings() -> None:
    """Those of the shell that it names, and any others that are in a file."""
    for name in ("bdh", "bdh-2"):
        service = COMPOSE["services"][name]
        assert service["env_file"] == [{"path": "serve.env", "required": False}]
        for setting in ("BDH_SERVE__ALLOWED_HOSTS", "BDH_SERVE__LIMITS__STORAGE"):
            assert service["environment"][setting].startswith(f"${{{setting}:-")
        assert service["environment"]["BDH_API_KEYS"] is None


def test_a_server_without_keys_answers_to_what_calls_it_here() -> None:
    """Prometheus, which finds addresses by the name of all replicas; nginx with the names of its clients; the probe."""
    stage = whole("cpu")
    check = HostCheck(environment_of(stage)["BDH_SERVE__HOST"], [])
    [scraped] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    [discovery] = scraped["dns_sd_configs"]
    assert discovery["type"] == "A"  # the Host is an address
    for host in ("172.18.0.3:8000", "bdh:8000", "bdh-2:8000", "127.0.0.1:8000", "localhost:8080"):
        assert check.is_allowed(host)


# ---------------------------------------------------------------------------------------------------------- Kubernetes


def test_kubernetes_takes_the_manifest() -> None:
    for one in objects().values():
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_manifest_fits_together_and_fits_the_server(tmp_path: Path) -> None:
    found = objects()
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (tmp_path / "serve.yaml").write_text(found["ConfigMap"]["data"]["serve.yaml"])
    config = parsed_config(["--config", str(tmp_path / "serve.yaml")])
    validate(config)
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + config.drain_seconds + 5
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == whole("cpu").last("USER")
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts["models"]["readOnly"] and config.models[0].path.startswith(mounts["models"]["mountPath"])
    assert config.sessions.folder is not None
    assert config.sessions.folder.startswith(f"{mounts['sessions']['mountPath']}/")
    assert config.auth.keys_file == f"{mounts['keys']['mountPath']}/keys.json"
    assert container["args"] == ["--config", f"{mounts['config']['mountPath']}/serve.yaml"]
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert {f"PersistentVolumeClaim {claim}" for claim in claims} <= set(found)
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["path"] for probe in probes.values()} == {"/health/live", "/health/ready"}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Service", "PodDisruptionBudget"):
        selector = found[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector).items() <= labels
    asked = [metric for metric in found["HorizontalPodAutoscaler"]["spec"]["metrics"] if metric["type"] == "Pods"]
    assert {metric["pods"]["metric"]["name"] for metric in asked} <= told_names()


# ----------------------------------------------------------------------------------------------- Prometheus and Grafana


def told_names() -> set[str]:
    """The names of all figures that a server tells once everything has happened to it."""
    metrics = Metrics()
    metrics.watch("tiny", EngineStats, 4, 1000, lambda: {"prefix_cache": 0.0})
    metrics.request_done("/v1/models", "tiny", 200, 0.1)
    metrics.refused("auth")
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name for family in families for sample in family.samples} | {"up"}


def check_query(query: str) -> None:
    """That a query is one, and asks for figures that there are."""
    query = query.replace("$__rate_interval", "1m")
    promql_parser.parse(query)
    asked = set(re.findall(r"\b(?:bdh|process)_\w+|\bup\b", re.sub(r'"[^"]*"', '""', query)))
    assert asked and asked <= told_names(), asked - told_names()


def test_prometheus_watches_the_replicas_and_its_rules_are_about_what_they_tell() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    (found,) = job["dns_sd_configs"]
    for name in ("bdh", "bdh-2"):
        assert found["names"] == COMPOSE["services"][name]["networks"]["default"]["aliases"]
    rules = [
        rule
        for file in config["rule_files"]
        for group in yaml.safe_load((DEPLOY / file).read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) >= 5
    for rule in rules:
        check_query(rule["expr"])
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]
        if "job=" in rule["expr"]:
            assert f'job="{job["job_name"]}"' in rule["expr"]


def test_the_dashboards_queries_ask_for_what_there_is() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert {"datasource", "model", "instance"} == variables
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            check_query(target["expr"])
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables and "instance" in used, panel["title"]
            assert target["datasource"]["uid"] == "${datasource}"
    for variable in DASHBOARD["templating"]["list"][1:]:
        (asked,) = re.findall(r"label_values\((\w+),", variable["definition"])
        assert asked in told_names()
    everything = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    unseen = {name for name in told_names() if name.startswith("bdh_") and name not in everything}
    unseen = {name for name in unseen if not name.endswith(("_created", "_sum", "_count", "_info"))}
    assert not unseen  # a figure that nobody looks at


def test_the_dashboards_panels_lie_side_by_side() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_grafana_finds_its_datasource_and_its_dashboard() -> None:
    services = COMPOSE["services"]
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"][0].endswith(":9090")
    (provider,) = yaml.safe_load((provisioning / "dashboards/bdh.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/bdh.json"


# --------------------------------------------------------------------------------------------------------------- nginx


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    check(NGINX, "-t", "-c", adapted(tmp_path, 18080, (18001, 18002)), "-e", tmp_path / "stderr")


def test_nginx_knows_the_servers_limits_and_composes_replicas() -> None:
    text, requests = CONF.read_text(), ServeConfig().requests
    assert int(*re.findall(r"client_max_body_size (\d+)m;", text)) << 20 == requests.max_body_bytes
    assert int(*re.findall(r"proxy_read_timeout (\d+)s;", text)) > requests.seconds
    assert all(
        int(found) < requests.idle_seconds for found in re.findall(r"    keepalive_timeout (\d\d)s;\n    }", text)
    )
    assert set(re.findall(r"server (\S+):8000", text)) == {"bdh", "bdh-2"}
    assert COMPOSE["services"]["nginx"]["ports"][0].endswith(":8080") and "listen 8080;" in text
