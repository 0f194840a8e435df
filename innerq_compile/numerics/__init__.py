"""What every number is: settings, quantizers, the layout of every buffer, and the oracle of every op."""
