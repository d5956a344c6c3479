"""The engines that hotcold is measured against."""
