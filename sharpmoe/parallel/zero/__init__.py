"""DeepSpeed's ZeRO-2 and ZeRO-3 behind one engine; the only folder that relies on inner names of DeepSpeed 0.19.8."""
