# Durable buffers: whatever is killed, and whenever, what committed transactions
# have counted is stored once.  The truth is a table that the same transactions
# write.

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

# Each transaction counts in two buffers and in the truth.  Those of `slow' are
# held, those of `quick' are stored all the time.
my $definitions = q{
CREATE TABLE truth (buffer text, key text, n bigint);
CREATE TABLE quick_target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
CREATE TABLE slow_target (LIKE quick_target INCLUDING ALL);
SELECT sb_create('quick', 'quick_target', 'n', 'durable=true', 'interval=20ms');
SELECT sb_create('slow', 'slow_target', 'n', 'durable=true', 'interval=1h');
CREATE FUNCTION count_up(b text, key text, n bigint) RETURNS void LANGUAGE sql AS $$
	INSERT INTO truth VALUES (b, key, n);
	SELECT sb_increment(key, n, b::regclass);
$$;

-- what is stored and held, and should be
CREATE VIEW books AS
	SELECT buffer, key, sum(truth) AS truth, sum(stored) AS stored, sum(held) AS held
	FROM (
		SELECT buffer, key, n AS truth, 0 AS stored, 0 AS held FROM truth
		UNION ALL SELECT 'quick', key, 0, n, 0 FROM quick_target
		UNION ALL SELECT 'slow', key, 0, n, 0 FROM slow_target
		UNION ALL SELECT 'quick', key, 0, 0, n FROM quick
		UNION ALL SELECT 'slow', key, 0, 0, n FROM slow) AS entries
	GROUP BY buffer, key;
};
my $load = q{
\set k random(1, 200)
\set n random(1, 9)
BEGIN;
SELECT count_up('quick', 'key ' || :k, :n);
SELECT count_up('slow', 'key ' || :k, :n);
COMMIT;
};

# Everything is stored, and is what was counted.
sub balances
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(sql(q{SELECT sb_drain('quick'), sb_drain('slow')}), 't|t', "$what: everything is stored");
	is(sql(q{SELECT * FROM books WHERE truth <> stored OR held <> 0 ORDER BY 1, 2 LIMIT 10}), '', "$what: and is what was counted");
	return;
}

my ($node, $how, @victims);

sub kill_process
{
	my ($pid, $what) = @_;
	my $offset = -s $node->logfile;

	kill 'KILL', $pid or die "$what: there is no process $pid";
	$node->wait_for_log(qr/\(PID $pid\) was terminated by signal 9/, $offset);
	$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	return;
}

sub stop_immediately
{
	$node->stop('immediate');
	$node->start;
	return;
}

# Sessions count, something is killed, and nothing is lost or counted twice.
sub crash_under_load
{
	my ($what, $crash) = @_;
	my $rows = sql('SELECT count(*) FROM truth');
	my $load = start_load($node, $load, '-c', '4', '-T', '3600');

	$what = "$how, $what";
	wait_for($node, $db, "SELECT count(*) > $rows + 400 FROM truth", "$what: sessions count");
	$crash->($what);
	$load->{run}->finish;
	return;
}

sub pid_of
{
	my ($condition) = @_;

	return sql("SELECT pid FROM pg_stat_activity WHERE $condition ORDER BY random() LIMIT 1");
}

foreach my $preloaded (1, 0)
{
	$how = $preloaded ? 'preloaded' : 'not preloaded';
	$node = new_node($preloaded ? 'preloaded' : 'plain',
		'restart_after_crash = on',
		'max_prepared_transactions = 10',
		q{statbuffer.ledger_size = '1MB'},
		$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');
	sql($definitions);

	# What one session has counted, and nobody else does.
	sql(q{SELECT count_up('slow', 'key ' || i, i) FROM generate_series(1, 100) AS i});
	stop_immediately();
	is(sql(q{SELECT count(*) FROM books WHERE truth <> stored + held}), '0', "$how: all is there after a crash");
	stop_immediately();
	stop_immediately();
	balances("$how, two crashes in a row");

	# It is there without anybody's help, if the library is preloaded.
	sql(q{SELECT count_up('quick', 'key ' || i, i) FROM generate_series(1, 100) AS i});
	stop_immediately();
	if ($preloaded)
	{
		wait_for($node, $db, q{
				SELECT (SELECT sum(n) FROM truth WHERE buffer = 'quick') = (SELECT sum(n) FROM quick_target)},
			"$how: it is stored without anybody's help");
	}
	balances("$how, after a crash");

	# Under load: a session, a worker, the launcher, the postmaster.
	crash_under_load('a session', sub { kill_process(pid_of(q{application_name = 'load'}), $_[0]) });
	crash_under_load('another one, and nothing was stored since', sub { kill_process(pid_of(q{application_name = 'load'}), $_[0]) });
	balances("$how, two sessions were killed");
	crash_under_load('a worker', sub { kill_process(worker_of($node, $db, 'quick'), $_[0]) });
	crash_under_load('the launcher', sub { kill_process(pid_of(q{backend_type = 'statbuffer launcher'}), $_[0]) });
	crash_under_load('immediate stop', \&stop_immediately);
	balances("$how, a worker, the launcher, and all");

	# A clean stop saves nothing of it in the file, and it is there afterwards.
	sql(q{ALTER FOREIGN TABLE slow OPTIONS (ADD shutdown '0')});
	sql(q{SELECT count_up('slow', 'saved', 42)});
	$node->stop;
	ok(!-e $node->data_dir . '/statbuffer.saved', "$how: a stop saves no counts of durable buffers");
	$node->start;
	is(sql(q{SELECT sb_total('saved', 'slow')}), '42', "$how: there after a restart");
	balances("$how, after a restart");

	# TRUNCATE discards what was not loaded, but not if it is rolled back.
	sql(q{SELECT count_up('slow', 'kept', 11)});
	stop_immediately();
	sql(q{
		SELECT count_up('slow', 'kept', 1);
		BEGIN;
		SAVEPOINT s;
		TRUNCATE slow;
		ROLLBACK TO s;
		COMMIT});
	is(sql(q{SELECT sb_total('kept', 'slow')}), '12', "$how: TRUNCATE was rolled back before it was loaded");
	balances("$how, TRUNCATE was rolled back");
	sql(q{SELECT sb_increment('discarded', 1, 'slow')});
	stop_immediately();
	sql(q{TRUNCATE slow}) if !$preloaded;
	is(sql(q{SELECT sb_total('discarded', 'slow')}), $preloaded ? '1' : '0', "$how: TRUNCATE before it is loaded");
	sql(q{INSERT INTO truth VALUES ('slow', 'discarded', 1)}) if $preloaded;

	# Switching it off takes what was not loaded: then a stop saves it.
	sql(q{SELECT count_up('slow', 'off', 7)});
	stop_immediately();
	sql(q{ALTER FOREIGN TABLE slow OPTIONS (SET durable 'false')});
	is(sql(q{SELECT sb_total('off', 'slow')}), '7', "$how: switched off after a crash");
	sql(q{SELECT count_up('slow', 'off', 3)});
	$node->restart;
	is(sql(q{SELECT sb_total('off', 'slow')}), '10', "$how: saved when it is not durable");
	sql(q{ALTER FOREIGN TABLE slow OPTIONS (SET durable 'true')});
	$node->restart;
	is(sql(q{SELECT sb_total('off', 'slow')}), '10', "$how: and not saved twice when it is again");
	balances("$how, switched");
	$node->stop;
	unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal (?!9:)|could not keep/,
		"$how: nobody has died but those who were killed");
}

done_testing();
