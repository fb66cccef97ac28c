from agent.coverage.catalog import Catalog, Method, Unit


def method(name: str, *probes: int, checksum: str = "00") -> Method:
    return Method(name=name, params=(), return_type="", probes=probes, checksum=checksum)


def unit(name: str = "math.js", *, file: str | None = "/p/math.js", checksum: str = "00") -> Unit:
    methods = (method("GLOBAL", 0, 1), method("div", 2, checksum=checksum))
    return Unit(path="src", name=name, methods=methods, lines=(1, 2, 2), file=file)


def test_a_class_is_named_by_its_folder_and_file() -> None:
    assert unit().class_id == "src/math.js"
    assert unit().probe_count == 3


def test_a_file_that_is_read_again_takes_the_place_of_its_former_self() -> None:
    catalog = Catalog()
    assert catalog.add([unit()]) == []
    assert catalog.add([unit(checksum="ff")]) == []
    assert list(catalog.units) == ["src/math.js"]
    assert catalog.of_file("/p/math.js") == unit(checksum="ff")


def test_of_two_files_with_one_class_id_the_first_stays() -> None:
    catalog = Catalog()
    second = unit(file="/other/math.js")
    assert catalog.add([unit(), second]) == [second]
    assert catalog.units["src/math.js"].file == "/p/math.js"
    assert catalog.of_file("/other/math.js") is None


def test_the_digest_changes_with_what_is_announced_and_with_nothing_else() -> None:
    def digest(*units: Unit) -> str:
        catalog = Catalog()
        catalog.add(units)
        return catalog.digest()

    two = unit(), unit("other.js", file="/p/other.js")
    assert digest(*two) == digest(*reversed(two))
    assert len(digest(*two)) == 12
    assert digest(unit()) == digest(unit(file="/elsewhere/math.js"))
    assert len({digest(), digest(*two), digest(unit()), digest(unit(checksum="ff"))}) == 4
