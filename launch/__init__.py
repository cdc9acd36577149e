"""Commands around training, a package each: matrix, report, bench, scaling, chaos; estimate, export, gpu_check."""
