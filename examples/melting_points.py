"""Melting points of molecules with what RDKit tells of their structure: for molecules.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.model_selection import GroupShuffleSplit

try:
    from chemicals import phase_change
    from chemicals.identifiers import pubchem_db
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors
    from rdkit.Chem.Scaffolds import MurckoScaffold
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install rdkit chemicals") from error

# Properties that take long, or are sums that others tell.
SLOW = {"CrippenClogP", "NumRotatableBonds", "chi4n", "chi4v", "kappa3", "chi3n", "chi3v", "Phi", "exactmw", "NumAtoms"}


@dataclass
class Molecules:
    """Structures, scaled features (n, 1057) and (n, 43), melting points (n,) in kelvin, rows to fit and to hold out."""

    structures: list[Any]
    wide: np.ndarray
    narrow: np.ndarray
    melting: np.ndarray
    scaffolds: np.ndarray
    train: np.ndarray
    held: np.ndarray


def load(count: int | None) -> Molecules:
    """All molecules, or so many of the common ones, whose table is small; a fifth is held out."""
    RDLogger.DisableLog("rdApp.*")
    table = phase_change.Tm_ON_data.sample(frac=1.0, random_state=0)
    counts = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    names = [n for n in rdMolDescriptors.Properties.GetAvailableProperties() if n not in SLOW]
    properties = rdMolDescriptors.Properties(names)
    structures, fingerprints, told, melting, scaffolds = [], [], [], [], []
    for number, kelvin in zip(table.index, table["Tm"], strict=True):
        known = pubchem_db.search_CAS(number, autoload=count is None)
        molecule = Chem.MolFromSmiles(known.smiles) if known else None
        if molecule is None or molecule.GetNumHeavyAtoms() < 3:
            continue
        structures.append(molecule)
        fingerprints.append(counts.GetCountFingerprintAsNumPy(molecule))
        told.append(list(properties.ComputeProperties(molecule)))
        scaffolds.append(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule) or f"none, {len(scaffolds)}")
        melting.append(float(kelvin))
        if len(melting) == count:
            break
    groups = np.unique(scaffolds, return_inverse=True)[1]
    train, held = next(GroupShuffleSplit(1, test_size=0.2, random_state=0).split(groups, groups=groups))
    logs, plain = np.log1p(np.stack(fingerprints).astype(np.float64)), np.array(told)
    plain = (plain - plain[train].mean(0)) / (plain[train].std(0) + 1e-9)
    components = PCA(10, random_state=0).fit(logs[train]).transform(logs)
    narrow = np.concatenate([plain, components / components[train].std(0)], 1).clip(-5, 5)
    wide = np.concatenate([logs, plain.clip(-5, 5) / 3], 1)
    return Molecules(structures, wide, narrow, np.array(melting), groups, train, held)
