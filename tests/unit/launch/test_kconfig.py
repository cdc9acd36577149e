import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.matrix import kconfig
from launch.matrix.cells import load_matrix
from launch.matrix.menu import DEFCONFIGS
from launch.matrix.symbols import KCONFIG, config_text, load, read_menu

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def config(tmp_path, *lines):
    path = tmp_path / ".config"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_study_as_reported():
    cells = load_matrix(DEFCONFIGS / "resnet50-imagenet", seeds=[0]).cells
    assert [cell.name for cell in cells] == [
        "resnet50_momentum_movement_70_seed0",
        "resnet50_adam_movement_70_seed0",
        "resnet50_adamw_movement_70_seed0",
        "resnet50_adamwadv_movement_70_seed0",
        "resnet50_adamwspam_movement_70_seed0",
        "resnet50_adamwprune_state_70_seed0",
    ]
    assert all(cell.config.epochs == 90 and cell.config.mixed_precision == "bf16" for cell in cells)


def test_methods_and_sparsities(tmp_path):
    path = config(
        tmp_path,
        "CONFIG_PRUNING_ENABLE_NONE=y",
        "CONFIG_PRUNING_ENABLE_DISPLACEMENT=y",
        "CONFIG_PRUNING_STATE_ALL=y",
        "# CONFIG_PRUNING_ENABLE_MOVEMENT is not set",
        "CONFIG_SPARSITY_ENABLE_95=y",
        'CONFIG_SEEDS="7"',
        "# CONFIG_OPTIMIZER_ENABLE_ADAMW is not set",
        "# CONFIG_OPTIMIZER_ENABLE_ADAMWSPAM is not set",
        "# CONFIG_OPTIMIZER_ENABLE_ADAM is not set",
        "CONFIG_SGD_NESTEROV=y",
        'CONFIG_LR_ADAM="5e-4"',
        'CONFIG_EXTRA_ARGS="--smoothing 0.2"',
        "CONFIG_RANKS=1",
        "CONFIG_NUM_EPOCHS=3",
    )
    matrix = load_matrix(path)
    assert [cell.name.removeprefix("resnet18_") for cell in matrix.cells] == [
        "sgd_none_seed7",
        "sgd_movement-displacement_70_seed7",
        "sgd_movement-displacement_95_seed7",
        "adamwadv_none_seed7",
        "adamwadv_movement-displacement_70_seed7",
        "adamwadv_movement-displacement_95_seed7",
        "adamwadv_state_70_seed7",
        "adamwadv_state_95_seed7",
        "adamwprune_state_70_seed7",
        "adamwprune_state_95_seed7",
    ]
    assert {cell.config.lr for cell in matrix.cells if "adam" in cell.name} == {5e-4}
    assert all(cell.config.epochs == 3 and cell.config.smoothing == 0.2 for cell in matrix.cells)
    assert matrix.launcher[-2:] == ("--num_processes", "1")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["CONFIG_OPTIMIZER_ENABLE_SDG=y"], "OPTIMIZER_ENABLE_SDG"),
        (["CONFIG_NUM_EPOCHS=-3"], "NUM_EPOCHS"),
        (['CONFIG_LR_ADAM="fast"'], "is not a number"),
        (['CONFIG_SEEDS="0,1"'], "are not whole numbers"),
        (['CONFIG_SPARSITIES="0.5:x"'], "are not numbers or ranges"),
        (['CONFIG_SEEDS="0.5:2:0.5"'], "are not whole numbers"),
        (['CONFIG_SEEDS="3:0:1"'], "range 3:0:1: its step does not lead"),
        (["# CONFIG_SPARSITY_ENABLE_70 is not set"], "these choices make no run"),
        (["CONFIG_NUM_EPOCHS=five"], "it is a whole number"),
        (["CONFIG_SPARSITY_ENABLE_90=maybe"], "it is y or n"),
        (["CONFIG_MODEL=resnet18"], "stand in quotes"),
        (['CONFIG_NUM_EPOCHS="3"'], "stand in quotes"),
        (["CONFIG_NUM_EPOCHS=3", "CONFIG_NUM_EPOCHS=4"], "set twice"),
        (["CONFIG_AMP_FP16=y", "CONFIG_AMP_BF16=y"], "exclude each other"),
        (["NUM_EPOCHS=3"], "sets no symbol of launch/Kconfig"),
    ],
)
def test_mistakes_are_errors(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        load_matrix(config(tmp_path, *lines))


def test_defconfig_and_back(tmp_path, capsys):
    target = tmp_path / ".config"
    assert kconfig.main(["defconfig", "demo", "--config", str(target)]) == 0
    assert kconfig.main(["name", "--config", str(target)]) == 0
    assert capsys.readouterr().out.strip() == "demo"
    assert [cell.arguments for cell in load_matrix(target).cells] == [
        cell.arguments for cell in load_matrix(DEFCONFIGS / "demo").cells
    ]
    with pytest.raises(SystemExit):
        kconfig.main(["defconfig", "none", "--config", str(target)])
    assert "no defconfig none; there are" in capsys.readouterr().err
    assert kconfig.main(["list-defconfigs"]) == 0
    assert "resnet50-strong" in capsys.readouterr().out


def by_kconfiglib(path):
    kconfiglib = pytest.importorskip("kconfiglib", reason="not installed; requirements.txt has it")
    menu = kconfiglib.Kconfig(str(KCONFIG), warn_to_stderr=False)
    menu.warn_assign_undef = True
    menu.load_config(str(path))
    values = {symbol.name: symbol.str_value for symbol in menu.unique_defined_syms}  # says what is out of range
    return values, menu.warnings


@pytest.mark.parametrize("path", sorted(DEFCONFIGS.iterdir()), ids=lambda path: path.name)
def test_defconfigs_are_read_as_kconfiglib_reads_them(path):
    assert (load(path), []) == by_kconfiglib(path)


MENU = read_menu(KCONFIG.read_text().splitlines())
TEXTS = st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=8)
VALUES = {"bool": st.sampled_from(["y", "n"]), "int": st.integers(-9, 70_000).map(str), "string": TEXTS}
SETTINGS = st.fixed_dictionaries({}, optional={name: VALUES[symbol.kind] for name, symbol in MENU.items()})


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(SETTINGS)
def test_any_choices_are_read_as_kconfiglib_reads_them(tmp_path, chosen):
    path = config(tmp_path, *config_text(chosen).splitlines())
    wanted, warnings = by_kconfiglib(path)
    several_of_a_choice = [chosen.get(name) for name, symbol in MENU.items() if symbol.choice].count("y") > 1
    try:
        found = load(path)
    except ValueError:
        assert warnings or several_of_a_choice  # there the last wins, without a word
        return
    assert (found, []) == (wanted, warnings)
    path.write_text(config_text(found))
    assert load(path) == found


def test_a_word_of_kconfig_that_is_not_read_is_named():
    with pytest.raises(ValueError, match="'select SGD' is not read"):
        read_menu(["config ADAM", "\tbool", "\tselect SGD"])


def test_the_menu_without_kconfiglib_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kconfiglib", None)  # importing what stands here as None fails
    target = tmp_path / ".config"
    assert kconfig.main(["defconfig", "gpu-quick", "--config", str(target)]) == 0
    assert load(target) == load(DEFCONFIGS / "gpu-quick")
    with pytest.raises(SystemExit):
        kconfig.main(["savedefconfig", "--config", str(target)])
    assert "kconfiglib is not installed" in capsys.readouterr().err


def test_every_defconfig_is_what_savedefconfig_would_write(tmp_path, monkeypatch):
    kconfiglib = pytest.importorskip("kconfiglib", reason="not installed; requirements.txt has it")
    for path in DEFCONFIGS.iterdir():
        menu = kconfiglib.Kconfig(str(ROOT / "launch" / "Kconfig"), warn_to_stderr=False)
        menu.load_config(str(path))
        menu.write_min_config(str(tmp_path / path.name), header="")
        written = set((tmp_path / path.name).read_text().splitlines())
        chosen = {line for line in path.read_text().splitlines() if "CONFIG_" in line}
        assert written <= chosen, path.name
        assert chosen - written <= {'CONFIG_RECIPE="launch/recipes/digits.yaml"'}, path.name  # said though the default


def test_a_menu_without_a_terminal_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "launch.matrix.kconfig", "menuconfig"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "make menuconfig needs a terminal" in done.stderr


def test_recipes_of_the_defconfigs_exist():
    for path in DEFCONFIGS.iterdir():
        assert yaml.safe_load(Path(load(path)["RECIPE"]).read_text())


def test_moments_of_float32_beside_a_memory_budget(tmp_path):
    path = config(
        tmp_path,
        "CONFIG_PRUNING_STATE_ALL=y",
        "CONFIG_PRUNING_STATE_FLOAT32=y",
        'CONFIG_SEEDS="0"',
        "# CONFIG_PRUNING_ENABLE_MOVEMENT is not set",
    )
    cells = load_matrix(path).cells
    assert sorted(cell.name for cell in cells if cell.config.state_dtype == "float32") == [
        f"resnet18_{opt}_state_70_state-dtype=float32_seed0" for opt in ("adam", "adamwadv", "adamwprune", "adamwspam")
    ]
    assert sum("_state_70_seed" in cell.name for cell in cells) == 4  # beside those within one


def test_ranges_of_seeds_and_sparsities(tmp_path):
    path = config(tmp_path, 'CONFIG_SEEDS="7 0:4:2"', 'CONFIG_SPARSITIES="0.6:0.8:0.1 0.99"')
    cells = [cell for cell in load_matrix(path).cells if cell.config.opt == "adamwprune"]
    assert list(dict.fromkeys(cell.config.seed for cell in cells)) == [7, 0, 2, 4]
    assert [cell.config.sparsity for cell in cells if cell.config.seed == 7] == [0.7, 0.6, 0.8, 0.99]


def test_patterns_stand_beside_single_weights(tmp_path):
    path = config(
        tmp_path,
        "CONFIG_PRUNING_PATTERN_2_4=y",
        "CONFIG_PRUNING_PATTERN_CHANNEL=y",
        "CONFIG_PRUNING_CHANNEL_LAYER=y",
        'CONFIG_SEEDS="0"',
        "# CONFIG_PRUNING_ENABLE_MOVEMENT is not set",
        "CONFIG_PRUNING_ENABLE_MAGNITUDE=y",
    )
    cells = load_matrix(path).cells
    assert [cell.name for cell in cells if cell.config.opt == "adamwprune"] == [
        "resnet18_adamwprune_state_70_seed0",
        "resnet18_adamwprune_state_prune-pattern=2:4_seed0",
        "resnet18_adamwprune_state_70_prune-pattern=channel_seed0",
        "resnet18_adamwprune_state_70_prune-pattern=channel_prune-scope=layer_seed0",
    ]
    assert sum(cell.config.prune_pattern == "2:4" for cell in cells if cell.config.pruning == "magnitude") > 3
