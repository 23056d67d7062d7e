"""Layers and MLP whose tiles are parameters of their own, for engines that gather them one by one."""
