# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# What the groups of dev/bench share: servers, runs, times, and the values that
# they give.
#
# A group is a file bench/GROUP.sh with a function measure_GROUP, which starts
# a server, measures, and checks that everything that was counted in it is
# there.  It takes the following from dev/bench: $rounds, $seconds, $quick (yes
# or nothing), $few, the rounds of what takes long, and $million,
# $hundred_thousand and $ten_thousand, the sizes of what it measures, which are
# less in a quick run.

# record WHAT WHO N UNIT VALUE: a value of this round.  N is the number of
# clients or of keys, where there are several.
record() {
	[[ $5 =~ ^[0-9.e+-]+$ ]] || die "$group: $1 of $2 gave '$5'"
	printf '%s,%s,%s,%s,%s,%s,%s\n' "$group" "$1" "$2" "$3" "$4" "$round" "$5" >>"$work/values.csv"
}

# each_round COMMAND...: in turn, with $round; the commands themselves see to
# it that those who are compared are measured one after the other.
each_round() {
	for ((round = 1; round <= rounds; round++)); do
		"$@"
	done
	round=1
}

# in_turn LIST...: prints the list, in every second round from its end, so that
# nobody always goes first.
in_turn() {
	if ((round % 2)); then
		printf '%s\n' "$@"
	else
		printf '%s\n' "$@" | tac
	fi
}

# --- SQL --------------------------------------------------------------------

sql() {
	psql -X -q -A -t -v ON_ERROR_STOP=1 "$@" </dev/null
}

# ask QUERY: its result
ask() {
	sql -c "$1"
}

# perform STATEMENT: without one
perform() {
	sql -c "$1" >/dev/null
}

# load FILE VARIABLE=VALUE...
load() {
	local file=$1 variables=() variable
	shift
	for variable in "$@"; do
		variables+=(-v "$variable")
	done
	sql "${variables[@]}" -f "$root/bench/$file"
}

# must_be_true WHAT QUERY: what was measured is what was asked for only if the
# result is right.
must_be_true() {
	[ "$(ask "$2")" = t ] || die "$group: $1 (not true: $2)"
}

must_be() {
	local found
	found=$(ask "$3")
	[ "$found" = "$2" ] || die "$group: $1 should be $2 and is $found ($3)"
}

# milliseconds STATEMENT: that it takes, its commit included.
milliseconds() {
	sql -c '\timing on' -c "$1" | sed -n 's/^Time: \([0-9.]*\) ms.*/\1/p'
}

# The same for a query whose rows nobody wants.
milliseconds_without_rows() {
	sql -c '\timing on' -c "EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF) $1" | sed -n 's/^Time: \([0-9.]*\) ms.*/\1/p'
}

# drain BUFFER
drain() {
	[ "$(ask "SELECT sb_drain('$1', '5min')")" = t ] || die "$group: draining $1 took too long"
}

# must_have_counted BUFFER N: so much, and neither more nor less of it is stored
# or held.  While a worker is at it, the sums are not of one moment, so there is
# more than one look.
must_have_counted() {
	local query i
	query="SELECT flushed_count + pending + in_flight FROM sb_stat_buffers WHERE relid = '$1'::regclass"
	for ((i = 0; i < 20; i++)); do
		[ "$(ask "$query")" != "$2" ] || return 0
		sleep 0.1
	done
	must_be "the sum of what $1 counted" "$2" "$query"
}

# --- servers ----------------------------------------------------------------

# bench_server NAME SETTING...: with nothing in it that comes and goes in the
# background, as far as settings can say so, and with room for what is measured.
# A second one beside it needs another $port.
bench_server() {
	local name=$1
	shift
	start_server "bench-$name" \
		"port = ${port:-5432}" \
		"max_connections = 300" \
		"max_worker_processes = 20" \
		"autovacuum = off" \
		"work_mem = '256MB'" \
		"checkpoint_timeout = '1h'" \
		"max_wal_size = '16GB'" \
		"${quick:+fsync = off}" \
		"statbuffer.max_memory = '8GB'" \
		"statbuffer.max_workers = 8" \
		"$@" || die "could not start a server"
	export PGPORT=${port:-5432}
	load setup.sql probe="'$work/probe'"
}

# What a session is to find under the name sb_increment: the increment, or the
# function that does nothing.  So both run the very same scripts.
search_path_of() {
	case $1 in
	no-op) echo '-c search_path=noop,public' ;;
	*) echo '-c search_path=public' ;;
	esac
}

# --- pgbench ----------------------------------------------------------------

# pipeline N FILE: a script that sends the command of FILE N times in one go,
# as one transaction.
pipeline() {
	local i
	printf '%s\n' '\startpipeline'
	for ((i = 0; i < $1; i++)); do
		grep -v '^--' "$2"
	done
	printf '%s\n' '\endpipeline'
}

# run_pgbench CLIENTS OPTION...: sets ntransactions to all that it made, and tps
# to how many there were a second.  While sessions connect, and in half a second
# after, it does not count for that: they load libraries and fill their caches.
# How much is run, $pgbench_amount tells where it is set.
run_pgbench() {
	local clients=$1 output=$work/log/pgbench.out much
	shift
	# connecting takes its time, which is part of that
	much=(-P 1 -T $((seconds + 1 + clients / 200)))
	[ -z "$quick" ] || much=(-t 20)
	[ -z "${pgbench_amount:-}" ] || read -r -a much <<<"$pgbench_amount"

	pgbench -n -M prepared -c "$clients" -j $((clients > 1 ? 2 : 1)) "${much[@]}" "$@" \
		>"$output" 2>&1 </dev/null || {
		cat "$output"
		die "$group: pgbench failed"
	}
	grep -q '^number of failed transactions: 0 ' "$output" || {
		cat "$output"
		die "$group: transactions failed"
	}
	ntransactions=$(sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' "$output")
	tps=$(awk '
		/^progress: / { from[++n] = to; to = $2; time[n] = $2 - from[n]; rate[n] = $4 }
		/^initial connection time = / { warm = $5 / 1000 + 0.5 }
		/^tps = / { whole = $3 }
		END {
			for (i = 1; i <= n; i++)
				if (from[i] >= warm) {
					sum += rate[i] * time[i]
					total += time[i]
				}
			print (total > 0 ? sum / total : whole)
		}' "$output")
}
