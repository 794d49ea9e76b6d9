"""What training costs, the laws that runs follow, and the plans drawn from both. Needs no torch."""
