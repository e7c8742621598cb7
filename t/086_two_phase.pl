# Prepared transactions that have counted in durable buffers: counted when they
# are committed, by whichever session, across restarts and crashes, and forgotten
# when they are rolled back.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = PostgreSQL::Test::Cluster->new('node');
$node->init;
$node->append_conf('postgresql.conf', qq{
shared_preload_libraries = 'statbuffer'
max_prepared_transactions = 10
wal_level = replica
max_wal_senders = 2
synchronous_commit = local
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;
use_node($node);
$node->safe_psql($db, q{
CREATE EXTENSION statbuffer;
CREATE TABLE t (k text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 't', 'n', 'durable=true', 'interval=1h');
SELECT sb_create('soft', 't', 'n', 'interval=1h');
CREATE TABLE likes (k text);
CREATE TRIGGER counting AFTER INSERT ON likes FOR EACH ROW EXECUTE FUNCTION sb_trigger('hits', 'k');
});

sub prepare
{
	my ($name, @statements) = @_;

	$node->safe_psql($db, join(';', 'BEGIN', @statements, "PREPARE TRANSACTION '$name'"));
	return;
}

# What a key has, stored or not: what is recovered after a crash is due at once.
sub count
{
	my ($key) = @_;

	return $node->safe_psql($db, "SELECT sb_total('$key', 'hits')");
}

# What a transaction has counted in every way is one row, and is counted at once
# when another session commits it.
prepare('a', q{INSERT INTO hits VALUES ('a', 2)},
	q{SELECT sb_increment('a', 3, 'hits')},
	q{SAVEPOINT s}, q{INSERT INTO hits VALUES ('a', 100)}, q{ROLLBACK TO s},
	q{INSERT INTO likes VALUES ('a'), ('b')});
is(count('a'), 0, 'what is prepared is not counted');
$node->safe_psql($db, q{COMMIT PREPARED 'a'});
is(count('a'), 6, 'it is counted when it is committed');
is(count('b'), 1, 'each key of it');

prepare('b', q{INSERT INTO hits VALUES ('a', 50)});
$node->safe_psql($db, q{ROLLBACK PREPARED 'b'});
is(count('a'), 6, 'what is rolled back is not counted');

# Nothing to count is nothing to prepare; others are refused.
prepare('c', q{INSERT INTO hits VALUES ('a', 1), ('a', -1)});
$node->safe_psql($db, q{COMMIT PREPARED 'c'});
is(count('a'), 6, 'an increment of 0 is not counted');
like(error_of(q{BEGIN; INSERT INTO soft VALUES ('x'); PREPARE TRANSACTION 'x'}),
	qr/cannot PREPARE a transaction that has incremented buffer "soft"/, 'a buffer that is not durable');
like(error_of(q{BEGIN; TRUNCATE hits; PREPARE TRANSACTION 'x'}),
	qr/cannot prepare a transaction that (has truncated|brings counts)/i, 'TRUNCATE');
like(error_of(q{BEGIN; ALTER FOREIGN TABLE soft OPTIONS (ADD durable 'true'); PREPARE TRANSACTION 'x'}),
	qr/cannot PREPARE a transaction that has set option "durable"/, 'switching it on');

prepare('c', 'SAVEPOINT s', 'TRUNCATE hits', 'ROLLBACK TO s', q{INSERT INTO hits VALUES ('a', 1)});
$node->safe_psql($db, q{ROLLBACK PREPARED 'c'});
is(count('a'), 6, 'a TRUNCATE that a savepoint has undone is none');

# Restarts and crashes: before it is committed, and before it is in memory.
prepare('d', q{INSERT INTO hits VALUES ('d', 1)});
prepare('e', q{INSERT INTO hits VALUES ('e', 1)});
prepare('f', q{INSERT INTO hits VALUES ('f', 1)});
$node->restart;
is(count('d'), 0, 'after a restart it is still prepared');
is(count('a'), 6, 'and what was counted is there');
$node->safe_psql($db, q{COMMIT PREPARED 'd'});
is(count('d'), 1, 'committed after the restart');
$node->stop('immediate');
$node->start;
is(count('d'), 1, 'there after a crash');
$node->safe_psql($db, q{COMMIT PREPARED 'e'; ROLLBACK PREPARED 'f'});
is(count('e'), 1, 'committed after the crash');
is(count('f'), 0, 'rolled back after the crash');
$node->stop('immediate');
$node->start;
is(count($_), 1, "$_ after another crash") for 'd', 'e';
is(count('a'), 6, 'a, too');

# While it is prepared, the buffer is not truncated or altered.
prepare('g', q{INSERT INTO hits VALUES ('g', 1)});
like(error_of(q{SET lock_timeout = '100ms'; TRUNCATE hits}), qr/lock timeout/,
	'TRUNCATE waits for who has prepared');
$node->safe_psql($db, q{COMMIT PREPARED 'g'});
$node->safe_psql($db, 'TRUNCATE hits');
is($node->safe_psql($db, 'SELECT count(*) FROM hits'), 0, 'TRUNCATE discards it when it is committed');

# What is committed is not reported as failed, although a session that has the
# buffer locked keeps the keeper from counting it.
prepare('g', q{INSERT INTO hits VALUES ('g', 1)});
my $altering = start_session($node, $db, 'BEGIN; ALTER FOREIGN TABLE hits OWNER TO CURRENT_USER',
	q{SELECT pg_advisory_lock_shared(1)}, 'COMMIT');
wait_for_session($altering, q{a.wait_event_type = 'Lock'}, 'ALTER waits for who has prepared');
my $waiting = $node->background_psql($db);
$waiting->query_safe('SELECT pg_advisory_lock(1)');
$node->safe_psql($db, q{SET statement_timeout = '300ms'; COMMIT PREPARED 'g'});
$waiting->quit;
finish_session($altering, 'ALTER is done');
wait_for($node, $db, q{SELECT sb_total('g', 'hits') = 1}, 'it is counted after that');
$node->safe_psql($db, 'TRUNCATE hits');

# Switching it off takes what is committed.
prepare('h', q{INSERT INTO hits VALUES ('h', 1)});
$node->safe_psql($db, q{COMMIT PREPARED 'h'});
$node->safe_psql($db, q{ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false')});
is(count('h'), 1, 'it is there when the buffer is no longer durable');
$node->stop('immediate');
$node->start;
is(count('h'), 0, 'and then a crash loses it');

# TRUNCATE discards, whether the buffer is durable at that moment or not.
$node->safe_psql($db, q{SELECT sb_increment('h', 5, 'hits');
BEGIN; TRUNCATE hits; ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true'); COMMIT;});
$node->stop('immediate');
$node->start;
is(count('h'), 0, 'truncated, and then switched on');
$node->safe_psql($db, q{SELECT sb_increment('h', 5, 'hits');
BEGIN;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false');
TRUNCATE hits;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true');
COMMIT;});
$node->stop('immediate');
$node->start;
is(count('h'), 0, 'truncated between off and on');
$node->safe_psql($db, q{ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false')});

$node->safe_psql($db, q{ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true')});

# Who switches a buffer off reads the ledger, and what others have prepared there,
# without having anything to do with them: serializable transactions do not conflict.
$node->safe_psql($db, q{
CREATE TABLE notes (n int);
CREATE TABLE others (k text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
SELECT sb_create('other', 'others', 'n', 'durable=true', 'interval=1h');
SELECT sb_create('gone', 'others', 'n', 'durable=true', 'interval=1h')});
$node->safe_psql($db, q{
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(*) FROM notes;
INSERT INTO hits VALUES ('x', 1);
PREPARE TRANSACTION 'serializable'});
$node->safe_psql($db, q{
BEGIN ISOLATION LEVEL SERIALIZABLE;
INSERT INTO notes VALUES (1);
ALTER FOREIGN TABLE other OPTIONS (SET durable 'false');
COMMIT});
$node->safe_psql($db, q{ROLLBACK PREPARED 'serializable'; ALTER FOREIGN TABLE other OPTIONS (SET durable 'true')});

# Nor does it touch what is nobody's: that is the keeper's, which deletes what was
# counted in a buffer that was truncated since.  Here it has done so, and not committed: it
# waits for a standby that is not there.
my $switching = $node->background_psql($db);
$switching->query_safe(q{SET synchronous_commit = local; BEGIN; ALTER FOREIGN TABLE other OPTIONS (SET durable 'false')});
prepare('gone', q{INSERT INTO gone VALUES ('x', 1)});
my $truncating = start_session($node, $db, 'TRUNCATE gone');
wait_for_session($truncating, q{a.wait_event_type = 'Lock'}, 'TRUNCATE waits for who has prepared, again');
$node->safe_psql($db, qq{ALTER SYSTEM SET synchronous_standby_names = 'nobody'; ALTER DATABASE $db SET synchronous_commit = 'on'});
$node->reload;
{
	local $ENV{PGOPTIONS} = '-c synchronous_commit=local';
	my $keeper = q{backend_type = 'statbuffer worker' AND query ~ 'prepared transactions'};

	wait_for($node, $db, q{SELECT current_setting('synchronous_standby_names') = 'nobody'}, 'nobody is waited for');
	$node->safe_psql($db, "SELECT pg_terminate_backend(pid, 100000) FROM pg_stat_activity WHERE $keeper");
	$node->safe_psql($db, q{COMMIT PREPARED 'gone'});
	finish_session($truncating, 'it is truncated');
	wait_for($node, $db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE $keeper AND wait_event = 'SyncRep'",
		'the keeper has deleted what is nobody\'s');
	$switching->query_safe("SET statement_timeout = '$patience'; COMMIT");
	$switching->quit;
	is($node->safe_psql($db, "SELECT count(*) FROM pg_stat_activity WHERE $keeper AND wait_event = 'SyncRep'"), '1', 'it still waits');
	$node->safe_psql($db, qq{ALTER SYSTEM RESET synchronous_standby_names; ALTER DATABASE $db RESET synchronous_commit});
}
$node->reload;

# In the end, each is stored once.
prepare('i', map { "INSERT INTO hits VALUES ('i', $_)" } 1 .. 10);
$node->safe_psql($db, q{COMMIT PREPARED 'i'});
is($node->safe_psql($db, q{SELECT sb_drain('hits')}), 't', 'drained');
$node->stop('immediate');
$node->start;
is($node->safe_psql($db, q{SELECT string_agg(k || n, ' ' ORDER BY k) FROM t WHERE n <> 0}), 'a6 b1 d1 e1 i55', 'what is stored');
is($node->safe_psql($db, 'SELECT count(*) FROM hits'), 0, 'and nothing is held after a crash');
$node->stop;
ok(!lines_in_log($node, qr/PANIC|TRAP|could not (?!send data to client)/), 'nothing went wrong');
done_testing();
