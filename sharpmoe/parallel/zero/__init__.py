"""ZeRO-2 and ZeRO-3 behind one engine; only this folder and experts/groups.py use inner names of DeepSpeed."""
