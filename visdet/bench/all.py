"""Measuring: timers, memory, operations, suites, records, comparison, reports and the dashboard."""
from visdet.core.cases import bench_case, cases, case_id, uncovered
from visdet.bench.stats import *
from visdet.bench.measure import measure, interleave, effect, pinned_threads, Timing
from visdet.bench.memory import memory, timeline, allocations, count_params
from visdet.bench.flops import flops, flop_formula, module_tree
from visdet.bench.isolate import run_isolated, peak_rss
from visdet.bench.environment import environment
from visdet.bench.result import Run, read_run, write_run, to_df, write_csv, read_csv, summary
from visdet.bench.store import Store, machine_class
from visdet.bench.calibrate import calibrate
from visdet.bench.suite import Suite, list_suites, load_suite, load_cases, measure_case, run_suite
from visdet.bench.peers import step_balance
from visdet.bench.compare import compare
from visdet.bench.gate import gate, check
from visdet.bench.report import report
from visdet.bench.dashboard import dashboard
