"""GPU clocks and energy: reads and sets them through NVML, and restores them however a job ends."""
