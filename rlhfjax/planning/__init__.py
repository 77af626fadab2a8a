"""Plans: what a recipe compiles to for hardware that is not here, whether it fits, and what it will take.

`plan.py` puts one together, from the programs of all stages (`stages/building.py`) that the real compilers make in
processes of their own (`compiler.py`). Nothing runs on a device.
"""
