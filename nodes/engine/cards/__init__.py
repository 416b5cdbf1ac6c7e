"""What a device is and can do: kernels of this torch, measured speeds, copies between cards."""
