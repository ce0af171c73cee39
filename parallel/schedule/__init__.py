"""Pipeline schedules as data: tables from pure functions, their checker, simulator and drawing."""
