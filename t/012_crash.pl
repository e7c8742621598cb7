# Crashes: a session, a worker, the launcher or the postmaster is killed, or
# the server is shut down immediately.  What was stored stays stored, what was
# held is lost, exactly that, and afterwards the server counts and flushes as
# before without anybody's help.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $db = 'postgres';

# The books: what was counted and committed (ledger), what handlers have stored
# (stored), what buffers hold (held), and what the test saw in them just before
# a crash (lost).  They balance when the first is the sum of the others, for
# each key.
my $definitions = q{
CREATE TABLE ledger (buffer text, key text, n bigint);
CREATE TABLE stored (buffer text, key text, n bigint, PRIMARY KEY (buffer, key));
CREATE TABLE lost (buffer text, key text, n bigint);

CREATE FUNCTION store(b text, keys text[], counts bigint[]) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored AS s SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n
$$;

-- flushes all the time
CREATE FUNCTION store_quick(keys text[], counts bigint[]) RETURNS void
LANGUAGE sql AS $$ SELECT store('quick', keys, counts) $$;
CREATE FOREIGN TABLE quick (key text NOT NULL, count bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_quick', interval '20ms', batch_size '50');

-- the default buffer does, too
CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('sb_default', ARRAY[key], ARRAY[counter]) $$;
SELECT sb_start();
ALTER FOREIGN TABLE sb_default OPTIONS (interval '20ms');

-- holds its counts, and its worker stays
CREATE FUNCTION store_slow(keys text[], counts bigint[]) RETURNS void
LANGUAGE sql AS $$ SELECT store('slow', keys, counts) $$;
CREATE FOREIGN TABLE slow (key text NOT NULL, count bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_slow', interval '1h', timeout '1h');

-- stores, and then waits at the gate
CREATE FUNCTION store_gated(key text, counter bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('gated', ARRAY[key], ARRAY[counter]);
	PERFORM pg_advisory_xact_lock_shared(4713);
END
$$;
CREATE FOREIGN TABLE gated (key text NOT NULL, count bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_gated', interval '20ms');

CREATE FUNCTION count_up(b text, key text, n bigint) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO ledger VALUES (b, key, n);
	SELECT sb_increment(key, n, b::regclass);
$$;

CREATE VIEW held AS
	SELECT 'quick' AS buffer, key, count AS n FROM quick
	UNION ALL SELECT 'sb_default', key, count FROM sb_default
	UNION ALL SELECT 'slow', key, count FROM slow
	UNION ALL SELECT 'gated', key, count FROM gated;
CREATE VIEW books AS
	SELECT buffer, key, sum(ledger) AS ledger, sum(stored) AS stored,
		sum(lost) AS lost, sum(held) AS held
	FROM (
		SELECT buffer, key, n AS ledger, 0 AS stored, 0 AS lost, 0 AS held FROM ledger
		UNION ALL SELECT buffer, key, 0, n, 0, 0 FROM stored
		UNION ALL SELECT buffer, key, 0, 0, n, 0 FROM lost
		UNION ALL SELECT buffer, key, 0, 0, 0, n FROM held) AS entries
	GROUP BY buffer, key;
};
my $unbalanced = 'SELECT * FROM books WHERE ledger <> stored + lost + held ORDER BY buffer, key';
my $sums = 'SELECT buffer, key, n FROM stored ORDER BY buffer, key';

my ($node, $how, $preloaded);

# Counts in every buffer; the keys are the same ones each time.
sub count_everywhere
{
	sql(q{
		SELECT count_up(b, 'key ' || i, i)
		FROM unnest(ARRAY['quick', 'sb_default', 'slow', 'gated']) AS b, generate_series(1, 30) AS i});
	return;
}

# Sessions that are going to be killed: nobody minds how they end.
my @sessions;

# One that runs statements, and sleeps when it is done.
sub start_victim
{
	push @sessions, start_session($node, $db, @_, 'SELECT pg_sleep(3600)');
	return $sessions[-1];
}

# Sessions that count all the time, each transaction in two buffers.
sub start_counting
{
	my $rows = sql('SELECT count(*) FROM ledger');

	push @sessions, start_load($node, q{
\set k random(1, 200)
\set n random(1, 9)
BEGIN;
SELECT count_up('quick', 'key ' || :k, :n);
SELECT count_up('sb_default', 'key ' || :k, :n);
COMMIT;
}, '-c', '3', '-T', '3600');
	wait_for($node, $db, "SELECT count(*) > $rows + 500 FROM ledger", "$how: sessions count");
	return;
}

sub pid_of
{
	my ($condition) = @_;

	return sql("SELECT pid FROM pg_stat_activity WHERE $condition ORDER BY pid LIMIT 1");
}

# A worker of `slow' that sleeps.  Where the library is not preloaded, it leaves after
# a second.
sub pid_of_idle_worker
{
	my $pid = '';

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		sql(q{SELECT sb_start('slow')});
		$pid = pid_of(q{backend_type = 'statbuffer worker' AND state = 'idle' AND query = 'slow'});
		last if $pid ne '';
		usleep(100_000);
	}
	return $pid;
}

# Kills a process of the server; the postmaster then starts the others anew.
sub kill_process
{
	my ($pid, $what) = @_;
	my $offset = -s $node->logfile;

	like($pid, qr/^\d+$/, "$what: there is one to kill");
	kill 'KILL', $pid;
	$node->wait_for_log(qr/\(PID $pid\) was terminated by signal 9/, $offset);
	$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	return;
}

# It can be started again when it and its last child are gone: children look
# whether it is there whenever they wait for something, unless they are stopped.
sub kill_postmaster
{
	my (@stopped) = grep { /^\d+$/ } @_;
	my ($pid) = split /\n/, slurp_file($node->data_dir . '/postmaster.pid');

	$node->kill9;
	kill 'KILL', @stopped;
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return if !kill(0, $pid) && $node->start(fail_ok => 1);
		usleep(100_000);
	}
	die 'the server could not be started again';
}

sub wait_until_exists
{
	my ($file) = @_;

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return 1 if -e $file;
		usleep(100_000);
	}
	return 0;
}

sub stop_immediately
{
	$node->stop('immediate');
	$node->start;
	return;
}

# Everything that is counted again is stored again, by itself.
sub goes_on
{
	my ($what) = @_;

	if ($preloaded)
	{
		wait_for($node, $db,
			q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'},
			"$what: the launcher comes back by itself");
	}
	is(sql(q{
			SELECT buffer, state, pid, keys, pending, in_flight, memory, oldest_due, increments,
				flushed_keys, flushed_count, handler_calls, failures, discarded, last_flush, last_error
			FROM sb_stat_buffers ORDER BY buffer}),
		join("\n", map { "$_|idle||0|0|0|0||0|0|0|0|0|0||" } qw(gated quick sb_default slow)),
		"$what: the statistics start from zero");
	is(sql('SELECT count(*) FROM held'), '0', "$what: nothing is held");
	is(sql($unbalanced), '', "$what: what was held is lost, and nothing else");

	count_everywhere();
	wait_for($node, $db, q{
			SELECT count(DISTINCT buffer) = 1 AND count(*) = 30 AND sum(held) = 465
				AND min(buffer) = 'slow' AND bool_and(ledger = stored + lost + held)
			FROM books WHERE held <> 0 HAVING NOT EXISTS (
				SELECT FROM books WHERE ledger <> stored + lost + held)},
		"$what: it counts and flushes again");
	is(scalar(my @launchers = processes($node, 'statbuffer launcher')), 1, "$what: there is one launcher");
	return;
}

# A crash while nobody counts: it is known exactly what is held, and so what is
# lost.
sub crash
{
	my ($what, $crash) = @_;
	my $stored;

	$what = "$how, $what";
	is(sql($unbalanced), '', "$what: the books balance before");
	isnt(sql('SELECT coalesce(sum(n), 0) FROM held'), '0', "$what: something is held");
	sql('INSERT INTO lost SELECT * FROM held');
	$stored = sql($sums);
	$crash->($what);
	$_->{run}->finish for splice @sessions;
	is(sql($sums), $stored, "$what: what was stored stays stored, and nothing comes to it");
	goes_on($what);
	return;
}

# A crash while sessions count: it is not known what was held.
sub crash_under_load
{
	my ($what, $crash) = @_;
	my $stored;

	$what = "$how, $what";
	start_counting();
	sql('CREATE TABLE IF NOT EXISTS stored_before AS TABLE stored WITH NO DATA');
	sql('TRUNCATE stored_before; INSERT INTO stored_before TABLE stored');
	$crash->($what);
	$_->{run}->finish for splice @sessions;
	is(sql('SELECT * FROM books WHERE stored > ledger - lost'), '',
		"$what: nothing was stored that was not counted");
	is(sql(q{
			SELECT * FROM stored_before b LEFT JOIN stored s USING (buffer, key)
			WHERE b.n > coalesce(s.n, 0)}), '', "$what: what was stored stays stored");
	sql(q{
		INSERT INTO lost SELECT buffer, key, ledger - stored - lost FROM books
		WHERE ledger <> stored + lost});
	goes_on($what);
	return;
}

foreach (1, 0)
{
	$preloaded = $_;
	$how = $preloaded ? 'preloaded' : 'not preloaded';
	$node = new_node($preloaded ? 'preloaded' : 'plain',
		'restart_after_crash = on',
		'statbuffer.max_workers = 8',
		$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');
	sql($definitions);
	count_everywhere();
	sql(q{SELECT sb_drain('quick'), sb_drain('sb_default'), sb_drain('gated')});

	# A session has counted, and its transaction is open.  What it has counted
	# outside of it is held.
	crash('a session in its transaction', sub {
		my ($what) = @_;

		my $victim = start_victim('BEGIN', q{SELECT count_up('slow', 'own', 1000)},
			q{SELECT count_up('quick', 'own', 1000)}, q{SELECT sb_async_increment('own', 7, 'slow')});
		wait_for($node, $db, q{SELECT sb_count('own', 'slow') = 7}, "$what: it has counted");
		sql(q{INSERT INTO ledger VALUES ('slow', 'own', 7); INSERT INTO lost VALUES ('slow', 'own', 7)});
		kill_process(pid_of("application_name = '$victim->{name}'"), $what);
	});

	# Workers: one sleeps, another one has handed a key over, and the handler
	# has written.
	crash('an idle worker', sub { kill_process(pid_of_idle_worker(), $_[0]) });

	start_victim('SELECT pg_advisory_lock(4713)');
	wait_for($node, $db, q{
			SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND granted},
		"$how: the gate is closed");
	sql(q{SELECT count_up('gated', 'key ' || i, 100) FROM generate_series(1, 5) AS i});
	wait_at_gate($node, $db, "$how: a handler has stored and waits");
	crash('a worker in a call', sub { kill_process(worker_of($node, $db, 'gated'), $_[0]) });

	crash('the launcher', sub { kill_process(pid_of(q{backend_type = 'statbuffer launcher'}), $_[0]) });
	crash('the postmaster', \&kill_postmaster);
	crash('immediate shutdown', \&stop_immediately);

	# In the middle of something, which it is not known.
	crash_under_load('a session that commits', sub {
		kill_process(pid_of(q{application_name = 'load'}), $_[0])
	});
	crash_under_load('a session that makes keys', sub {
		my ($what) = @_;

		my $victim = start_victim(q{SELECT count(sb_async_increment('made ' || g, 1, 'slow')) FROM generate_series(1, 3000000) g});
		wait_for($node, $db, q{SELECT keys > 20000 FROM sb_stat_memory}, "$what: the table grows");
		kill_process(pid_of("application_name = '$victim->{name}'"), $what);
	});
	crash_under_load('a worker that flushes', sub { kill_process(worker_of($node, $db, 'quick'), $_[0]) });
	crash_under_load('the postmaster under load', \&kill_postmaster);

	# What a clean shutdown has saved is loaded when the server starts, or when
	# somebody looks at counts.  Before that, a crash costs none of it; after
	# that, it is held like all else, and does not come back.
	$node->restart;
	if (!$preloaded)
	{
		my $victim = start_victim();
		wait_for($node, $db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = '$victim->{name}'",
			"$how: there is a session");
		kill_process(pid_of("application_name = '$victim->{name}'"), "$how, before counts are loaded");
		$_->{run}->finish for splice @sessions;
	}
	is(sql('SELECT count(*), sum(n) FROM held'), '30|465', "$how: what was saved is there");
	crash('after counts were loaded', sub {
		kill_process(pid_of(q{backend_type = 'statbuffer launcher'}), $_[0])
	});

	# The server dies after counts were saved and before its last checkpoint.
	# What was saved is there, and so is the transaction that counted it, though
	# its commit did not wait for the disk.
	sql('CHECKPOINT');
	my @writers = split /\n/, sql(q{
		SELECT pid FROM pg_stat_activity WHERE backend_type IN ('checkpointer', 'walwriter')});
	kill 'STOP', @writers;
	sql(q{SET synchronous_commit = off; SELECT count_up('slow', 'async', 1000)});
	$node->command_ok([ 'pg_ctl', '-D', $node->data_dir, '-m', 'fast', '-W', 'stop' ],
		"$how: the server is told to stop");
	ok(wait_until_exists($node->data_dir . '/statbuffer.saved'), "$how: counts are saved");
	kill_postmaster(@writers);
	is(sql(q{SELECT sb_count('async', 'slow')}), '1000', "$how: saved when the server died, and there");
	is(sql($unbalanced), '', "$how: the books balance");

	# After all that, a clean end.
	is(sql(q{SELECT sb_drain('slow')}), 't', "$how: drained");
	is(sql('SELECT count(*) FROM held'), '0', "$how: nothing is held");
	is(sql($unbalanced), '', "$how: the books balance");
	$node->stop;
	unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal (?!9:)/,
		"$how: nobody has died but those who were killed");
}

done_testing();
