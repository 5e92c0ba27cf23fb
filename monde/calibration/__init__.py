"""Measuring this machine into the profile that planning decides by. Measures and fits; decides nothing."""
