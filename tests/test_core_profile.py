"""Which hardware profile fits, why the others do not, and what becomes of those with an error."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.config import Overlay
from agent.core.errors import ConfigError
from agent.core.facts import NAMES, Fact
from agent.core.profile import BUNDLED, WEIGHTS, Choice, ProfileMissing, Profiles, forbidden
from agent.settings import check_overlays

RECORDED = sorted((Path(__file__).parent / "data/facts").glob("*.json"))
SHEET = {
    *("generic-x86_64", "generic-aarch64", "qemu-kvm", "raspberry-pi-4", "dell-poweredge", "supermicro"),
    *("nvidia-jetson", "beaglebone"),
}


def no_check(overlays: Sequence[Overlay]) -> list[ConfigError]:
    return []


def profiles(folder: Path, **texts: str) -> Profiles:
    """Profiles by name: what stands in the file behind `name = ...`; "_" in a name is written "-"."""
    for name, text in texts.items():
        file = name.replace("_", "-")
        (folder / f"{file}.toml").write_text(f'name = "{file}"\n{text}')
    return Profiles([folder], no_check)


def facts_of(recorded: dict[str, Any]) -> dict[str, Fact]:
    return {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in recorded["facts"].items()}


def refused(choice: Choice, folder: Path) -> dict[str, list[str]]:
    return {each.name: [error.replace(f"{folder}/", "") for error in each.errors] for each in choice.refused}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_each_recorded_machine_gets_its_profile_and_no_other_fits_as_well(path: Path) -> None:
    recorded = json.loads(path.read_text())
    assert recorded["facts"].keys() <= set(NAMES)
    choice = Profiles([BUNDLED], check_overlays).choose(facts_of(recorded))
    assert (choice.name, choice.warnings, choice.refused) == (recorded["profile"], (), ())


def test_every_profile_of_the_sheet_is_there_without_error_and_fits_a_machine() -> None:
    known = Profiles([BUNDLED], check_overlays)
    known.check_all()
    choice = known.choose({})
    assert {fit.name for fit in choice.fits} == SHEET
    assert choice.refused == ()
    assert {json.loads(path.read_text())["profile"] for path in RECORDED} >= SHEET


def test_the_most_specific_block_of_the_most_specific_profile_counts(tmp_path: Path) -> None:
    choice = profiles(
        tmp_path,
        generic='match.arch = "x86_64"',
        vendor='[[match]]\narch = "x86_64"\n[[match]]\ndmi.sys_vendor = "dell*"\n[[match]]\ndmi.sys_vendor = "HP"',
        product='[match]\ndmi.product_name = ["R[67]40", "PowerEdge*"]\nmemory_mib = ">=4096"',
        small='match.memory_mib = "<4096"\nabout = "small"',
        other='[match]\ndmi.sys_vendor = "Dell*"\npci = "10de:*"',
        abstract="settings.suites.slots = 1",
    ).choose(
        {
            **{"arch": "x86_64", "dmi.sys_vendor": "DELL Inc.", "dmi.product_name": "PowerEdge R640"},
            **{"memory_mib": 4096, "pci": ("8086:1528", "14e4:16d8")},
        }
    )
    assert choice.name == "product"
    assert [(fit.name, fit.score, fit.failed) for fit in choice.fits] == [
        ("product", 8 + 1, None),
        ("vendor", 4, None),
        ("generic", 1, None),
        ("other", 4, "pci is 8086:1528, 14e4:16d8, not 10de:*"),
        ("abstract", 0, "it has no match"),
        ("small", 0, "memory_mib is 4096, not <4096"),
    ]


def test_weights_are_of_facts() -> None:
    assert WEIGHTS.keys() <= set(NAMES)


def test_a_tie_goes_to_more_literal_characters_then_to_the_name_and_is_told(tmp_path: Path) -> None:
    known = profiles(
        tmp_path, b='match.os.id = "deb*"', c='match.os.id = "debia?"', a='match.os.id = "debi*"', d='match.arch = "x"'
    )
    choice = known.choose({"os.id": "debian"})
    assert choice.name == "c"
    assert choice.warnings == ("hardware profile c fits no better than a, b.",)
    (tmp_path / "c.toml").unlink()
    assert profiles(tmp_path, b='match.os.id = "debi*"').choose({"os.id": "debian"}).name == "a"


def test_a_fact_that_is_not_known_fails(tmp_path: Path) -> None:
    choice = profiles(tmp_path, a='match.dmi.sys_vendor = "*"').choose({})
    assert choice.name is None
    assert choice.fits[0].failed == "dmi.sys_vendor is not known, not *"


def test_parents_lie_below_and_whens_count_where_they_hold(tmp_path: Path) -> None:
    known = profiles(
        tmp_path,
        grand="settings.suites.slots = 1",
        parent='extends = "grand"\n[settings]\nsuites.slots = 2\n[[when]]\nmatch.arch = "x"\nsettings.suites.slots = 3',
        child='extends = "parent"\nmatch.arch = "x"\n[[when]]\nmatch.arch = "y"\nsettings.suites.slots = 4',
    )
    choice = known.choose({"arch": "x"})
    assert [(each.profile, each.data) for each in choice.overlays if each.data] == [
        ("grand", {"suites": {"slots": 1}}),
        ("parent", {"suites": {"slots": 2}}),
        ("parent", {"suites": {"slots": 3}}),
    ]


def test_the_one_that_is_asked_for_is_taken_even_if_it_does_not_fit(tmp_path: Path) -> None:
    known = profiles(tmp_path, a='match.arch = "x"', b='match.arch = "y"', broken="settings = 1")
    choice = known.choose({"arch": "x"}, "b")
    assert (choice.name, choice.forced, choice.warnings) == ("b", True, ())
    with pytest.raises(ProfileMissing, match=r"no hardware profile is called 'c'\. Use \"auto\", a, b\.") as missing:
        known.choose({}, "c")
    assert not missing.value.errors
    with pytest.raises(ProfileMissing) as missing:
        known.choose({}, "broken")
    assert "settings: expected a table" in str(missing.value.errors[0])


def test_a_later_folder_wins_by_name_also_with_a_profile_that_is_broken(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    profiles(here, a='match.arch = "x"\nabout = "bundled"', generic='match.arch = "*"')
    profiles(there, a='match.arch = "x"\nabout = "local"')
    assert Profiles([here, there], no_check).choose({"arch": "x"}).fits[0].about == "local"
    profiles(there, a='match.arhc = "x"')
    choice = Profiles([here, there, tmp_path / "absent"], no_check).choose({"arch": "x"})
    assert choice.name == "generic"
    assert refused(choice, there) == {"a": ["a.toml:2: match.arhc: is no fact. Did you mean arch?"]}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("match.arch = ", "b.toml:2: match.arch: not TOML"),
        ('matches.arch = "x"', "b.toml:2: matches: unknown key. Did you mean match?"),
        ("match = 1", "b.toml:2: match: expected a table or a list, got the number 1"),
        ("[match]", "b.toml:2: match: says nothing. Name a fact"),
        ("[[match]]\narch = true", "b.toml:3: match[0].arch: expected text, a number or a list of these"),
        ("match.arch = []", "b.toml:2: match.arch: expected text, a number or a list of these"),
        ('match.memory_mib = "4 GiB"', "b.toml:2: match.memory_mib: '4 GiB' is no number and no bound"),
        ('match.cpu = "x"', "b.toml:2: match.cpu: is no fact"),
        ('[[when]]\nmatch.arch = "x"', "b.toml:2: when[0].settings: is missing"),
        ('extends = "nobody"\nmatch.arch = "x"', "b.toml:2: extends: there is no profile nobody"),
        ('extends = "b"\nmatch.arch = "x"', "b.toml:2: extends: goes in a circle: b -> b"),
        ('extends = "broken"\nmatch.arch = "x"', "b.toml:2: extends: broken has errors itself"),
    ],
)
def test_a_profile_with_an_error_is_refused_by_name_and_the_next_is_taken(
    tmp_path: Path, text: str, error: str
) -> None:
    known = profiles(tmp_path, b=text, generic='match.arch = "*"', broken="settings = 1")
    known.check_all()
    choice = known.choose({"arch": "x"})
    assert choice.name == "generic"
    assert refused(choice, tmp_path)["b"][0].startswith(error)


def test_a_name_that_is_not_the_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "b"\nmatch.arch = "x"')
    choice = Profiles([tmp_path], no_check).choose({"arch": "x"})
    assert choice.name is None
    assert refused(choice, tmp_path) == {
        "a": ["a.toml:1: name: 'b' is not the file's. Write name = \"a\", or rename the file."]
    }


def test_settings_that_are_wrong_are_told_with_their_line(tmp_path: Path) -> None:
    for name, text in {
        "a": 'match.arch = "x"\n[settings]\nsuites.slots = 0\n[[when]]\nmatch.arch = "y"\nsettings.suites.slotz = 1',
        "generic": 'match.arch = "*"',
    }.items():
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\n{text}')
    choice = Profiles([tmp_path], check_overlays).choose({"arch": "x"})
    assert choice.name == "generic"
    assert refused(choice, tmp_path) == {
        "a": [
            "a.toml:4: suites.slots: 0 is less than 1. Use a number from 1 to 64.",
            "a.toml:7: suites.slotz: unknown key. Did you mean suites.slots?",
        ]
    }


@pytest.mark.parametrize(
    "setting",
    [
        'ident = "x"',
        'mimir.url = "ws://elsewhere/mimir"',
        'mimir.token_file = "/etc/shadow"',
        'control.listen = ["0.0.0.0:13172"]',
        "control.insecure_loopback = true",
        'control.tokens = [{ file = "mine" }]',
        'suites.roots = ["/"]',
        'logs.roots = ["/"]',
        'files.content_allow = ["/"]',
        'tls.ca_file = "/tmp/ca.pem"',
        'lab.listen = "0.0.0.0:1"',
    ],
)
def test_a_profile_sets_no_peers_tokens_roots_or_users(tmp_path: Path, setting: str) -> None:
    (tmp_path / "a.toml").write_text(f'name = "a"\nmatch.arch = "x"\n[settings]\n{setting}')
    choice = Profiles([tmp_path], check_overlays).choose({"arch": "x"})
    assert choice.name is None
    (errors,) = refused(choice, tmp_path).values()
    key = setting.partition(" =")[0]
    assert any(error.startswith("a.toml:4: ") and key.split(".")[0] in error for error in errors)
    assert "a hardware profile may not set it. Set it in /etc/agent/agent.toml." in errors[0]


def test_forbidden_keys_are_found_below_arrays(tmp_path: Path) -> None:
    known = profiles(tmp_path, a='match.arch = "x"\n[[settings.monitors.monitor]]\nid = "m"\nuser = "root"')
    overlays = known.choose({"arch": "x"}).overlays
    (error,) = forbidden(overlays, ["*.user"])
    assert (error.line, error.key) == (5, "monitors.monitor[0].user")


WORDS = st.sampled_from(["name", "extends", "match", "when", "settings", "arch", "cpu.cores"]) | st.text(max_size=3)
VALUES = st.recursive(
    st.booleans() | st.integers(0, 9) | st.text(max_size=4) | st.sampled_from([">=1", "a", "[", "*"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


def written(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {written(inner)}" for key, inner in value.items()) + "}"
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list) else json.dumps(value)


@given(st.dictionaries(WORDS, VALUES, max_size=4), st.dictionaries(st.sampled_from(NAMES), st.text(max_size=3)))
def test_whatever_a_profile_says_it_fits_or_not_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, says: dict[str, object], facts: dict[str, Fact]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "said"  # one for all examples; other tests leave files beside it
    folder.mkdir(exist_ok=True)
    text = "\n".join(f"{json.dumps(key)} = {written(value)}" for key, value in {"name": "a", **says}.items())
    (folder / "a.toml").write_text(text)
    known = Profiles([folder], check_overlays)
    known.check_all()
    choice = known.choose({"memory_mib": 5, **facts})
    assert len(choice.refused) + len(choice.fits) == 1
    assert all(".toml:" in error for each in choice.refused for error in each.errors)
