"""Makes data/houses.csv: SYNTHETIC house sales, drawn from the formula below. No row describes a real house.

    python examples/make_houses.py

The prices (EUR) are not exactly linear in the columns: distance counts less the further out a house is, old houses
gain again, and the noise grows with the price. So a linear model explains most of them, and not all.
"""

import csv
from pathlib import Path

import numpy as np

ROWS = 2000
SEED = 20240
DATA = Path(__file__).parent / "data" / "houses.csv"
# District: share of the houses, EUR per m² there, kilometres from the centre.
DISTRICTS = {
    "Old Town": (0.12, 3350, 1.2),
    "Harbour": (0.14, 3120, 2.5),
    "University": (0.17, 2950, 3.5),
    "Riverside": (0.19, 2880, 6.0),
    "Hillside": (0.22, 2640, 9.0),
    "Airport": (0.16, 2320, 13.0),
}
ENERGY_EUR = {"A": 34000, "B": 22000, "C": 11000, "D": 0, "E": -12000, "F": -26000, "G": -41000}


def make(rows: int = ROWS, seed: int = SEED) -> list[dict[str, object]]:
    """The houses, each a row of the table."""
    rng = np.random.default_rng(seed)
    shares = [share for share, _, _ in DISTRICTS.values()]
    houses: list[dict[str, object]] = []
    for district in rng.choice(list(DISTRICTS), rows, p=shares):
        _, per_m2, centre_km = DISTRICTS[district]
        area = float(np.clip(rng.lognormal(np.log(112), 0.32), 35, 320))
        rooms = int(np.clip(round(area / 27 + rng.normal(0, 0.8)), 1, 11))
        age = int(min(rng.gamma(2.0, 18.0), 130))
        distance = float(max(0.2, centre_km + rng.normal(0, 0.25 * centre_km + 0.3)))
        garden = 0.0 if rng.random() < 0.35 else float(rng.gamma(2.0, 40.0 + 14.0 * distance))
        # New houses are insulated better.
        energy = "ABCDEFG"[int(np.clip(round(1.2 + age / 20 + rng.normal(0, 1.1)), 0, 6))]
        price = (
            75_000
            + per_m2 * area
            + 6_500 * rooms
            - 1_250 * age
            + 9 * max(0, age - 60) ** 2
            - 30_000 * np.log1p(distance)
            + 95 * garden
            + ENERGY_EUR[energy]
        )
        price *= rng.lognormal(0, 0.075)
        houses.append(
            {
                "area_m2": round(area, 1),
                "rooms": rooms,
                "age_years": age,
                "distance_km": round(distance, 2),
                "garden_m2": round(garden),
                "energy_class": energy,
                "district": str(district),
                "price": round(price / 100) * 100,
            }
        )
    return houses


if __name__ == "__main__":
    houses = make()
    with DATA.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(houses[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(houses)
    print(f"{DATA}: {len(houses)} synthetic houses")
