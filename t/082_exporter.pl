# Metrics for Prometheus: Debian's prometheus-postgres-exporter, connected as a
# member of pg_monitor and with doc/monitoring/queries.yaml, delivers what
# sb_stat_buffers says, of all buffers of two databases.  The dashboard and the
# alerts ask for no other metrics, and Prometheus understands them.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use HTTP::Tiny;
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

sub find_program
{
	my ($found) = grep { -x } map { my $dir = $_; map { "$dir/$_" } @_ } split /:/, $ENV{PATH};

	return $found;
}

my $exporter_program = find_program('prometheus-postgres-exporter', 'postgres_exporter')
  or plan skip_all => 'prometheus-postgres-exporter is not installed';
my $promtool = find_program('promtool');
my $pages = "$FindBin::RealBin/../doc/monitoring";

# What is delivered, and of which type.  The labels come with each.
my %buffer_metrics = (
	statbuffer_failing => 'gauge',
	statbuffer_stopped => 'gauge',
	statbuffer_worker => 'gauge',
	statbuffer_keys => 'gauge',
	statbuffer_pending => 'gauge',
	statbuffer_in_flight => 'gauge',
	statbuffer_memory_bytes => 'gauge',
	statbuffer_flush_lag_seconds => 'gauge',
	statbuffer_increments_total => 'counter',
	statbuffer_flushed_keys_total => 'counter',
	statbuffer_flushed => 'gauge',
	statbuffer_handler_calls_total => 'counter',
	statbuffer_failures_total => 'counter',
	statbuffer_discarded => 'gauge',
	statbuffer_last_flush_timestamp_seconds => 'gauge',
	statbuffer_last_error_timestamp_seconds => 'gauge');
my %server_metrics = (
	statbuffer_server_launcher => 'gauge',
	statbuffer_server_workers => 'gauge',
	statbuffer_server_max_workers => 'gauge',
	statbuffer_server_max_memory_bytes => 'gauge');

# --- buffers of every kind --------------------------------------------------

# In one database the extension is where everybody looks, in the other one in a
# schema of its own.
# Preloaded, so that workers stay between the scrape and what it is compared with.
my $node = new_node('main', "shared_preload_libraries = 'statbuffer'", 'statbuffer.max_workers = 7',
	'statbuffer.max_memory = 64MB');
$node->safe_psql('postgres', q{
	CREATE ROLE prometheus LOGIN;
	GRANT pg_monitor TO prometheus;
	CREATE DATABASE app;
	CREATE DATABASE other;
});
$node->safe_psql('app', q{
	CREATE SCHEMA counting;
	CREATE EXTENSION statbuffer SCHEMA counting;
	GRANT USAGE ON SCHEMA counting TO prometheus;
	ALTER ROLE prometheus IN DATABASE app SET search_path = counting;
	ALTER DATABASE app SET search_path = public, counting;
});

my $long = q{interval '1h', timeout '1h', backoff '1h'};
make_buffer($node, 'postgres', 'good', $long);
make_buffer($node, 'postgres', 'failing', $long);
make_buffer($node, 'postgres', 'slow', q{interval '0', timeout '1h', batch_size '1'});
make_buffer($node, 'postgres', 'hasty', qq{$long, restart 'temporary'});
make_buffer($node, 'postgres', 'stopped', $long);
make_buffer($node, 'postgres', 'unused', $long);
make_buffer($node, 'app', 'good', $long);
$node->safe_psql('app', q{
	CREATE SCHEMA "Odd ""schema\\";
	CREATE FOREIGN TABLE "Odd ""schema\\"."Odd ""buffer\\" (key text, count bigint)
	SERVER statbuffer OPTIONS (handler 'good_store', interval '1h', timeout '1h');
	SELECT sb_increment('k', 4, '"Odd ""schema\\"."Odd ""buffer\\"');
});

# good: something is stored, something waits
increment($node, 'postgres', 'good', 'k', 5);
increment($node, 'postgres', 'good', 'l', -2);
is($node->safe_psql('postgres', q{SELECT sb_drain('good')}), 't', 'something is stored');
increment($node, 'postgres', 'good', 'k', 7_000_000_000);
increment($node, 'app', 'good', 'k', 11);

# failing: of two keys, one
$node->safe_psql('postgres', q{INSERT INTO failing_bad VALUES ('bad')});
increment($node, 'postgres', 'failing', 'bad', 3);
increment($node, 'postgres', 'failing', 'good', 4);
$node->safe_psql('postgres', q{SELECT sb_flush_all('failing')});
wait_for_stored($node, 'postgres', 'failing', 4, 'one key is stored');
wait_for($node, 'postgres', q{
	SELECT state = 'failing' AND in_flight = 0 AND keys = 2 FROM sb_stat_buffers WHERE buffer = 'failing'},
	'the other one fails');

# hasty: what fails is discarded
$node->safe_psql('postgres', q{INSERT INTO hasty_bad VALUES ('bad')});
increment($node, 'postgres', 'hasty', 'bad', 6);
$node->safe_psql('postgres', q{SELECT sb_flush_all('hasty')});
wait_for($node, 'postgres', q{SELECT discarded = 6 FROM sb_stat_buffers WHERE buffer = 'hasty'},
	'a count is discarded');

# stopped: with an error on its way
increment($node, 'postgres', 'stopped', 'k', 9);
$node->safe_psql('postgres', q{SELECT sb_stop('stopped')});

# slow: its handler has one key in hand, and another one is late
my $gate = close_gate($node, 'postgres');
increment($node, 'postgres', 'slow', 'a', 1);
wait_for($node, 'postgres', q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'slow'},
	'a handler is slow');
increment($node, 'postgres', 'slow', 'b', 2);
wait_for($node, 'postgres', q{SELECT oldest_due < clock_timestamp() FROM sb_stat_buffers WHERE buffer = 'slow'},
	'a key is late');

# --- the exporter -----------------------------------------------------------

my $port = PostgreSQL::Test::Cluster::get_free_port();
my $log = "$PostgreSQL::Test::Utils::log_path/exporter.log";
my $exporter;
{
	delete local @ENV{ grep { /^PG/ } keys %ENV };
	local $ENV{DATA_SOURCE_NAME} =
	  'user=prometheus dbname=postgres sslmode=disable host=' . $node->host . ' port=' . $node->port;
	$exporter = IPC::Run::start(
		[ $exporter_program, "--web.listen-address=127.0.0.1:$port", "--extend.query-path=$pages/queries.yaml",
			'--auto-discover-databases', '--include-databases=postgres,app' ],
		'<', \undef, '>&', $log);
}

# It ends with the test, whatever becomes of that.
END
{
	local $?;
	$exporter->kill_kill if $exporter;
}

# One look at the metrics: their text, their types, and their values by name and
# labels.  The label that the exporter adds, the server, is left out.
sub scrape
{
	my $response;
	my (%types, %values);

	foreach (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		$response = HTTP::Tiny->new(timeout => 60)->get("http://127.0.0.1:$port/metrics");
		last if $response->{success};
		IPC::Run::run([ 'sleep', '0.1' ]);
	}
	if (!$response->{success})
	{
		diag(slurp_file($log));
		die "the exporter does not answer: $response->{status} $response->{content}";
	}
	foreach (split /\n/, $response->{content})
	{
		$types{$1} = $2 if /^# TYPE (\S+) (\S+)/;
		next unless /^(pg_exporter_\w+|statbuffer_\w+)(?:\{(.*)\})? (\S+)$/;
		my ($metric, $labels, $value) = ($1, $2 // '', $3);
		my %labels;
		while ($labels =~ /(\w+)="((?:[^"\\]|\\.)*)"/g)
		{
			my ($label, $text) = ($1, $2);
			$labels{$label} = $text =~ s/\\(.)/$1 eq 'n' ? "\n" : $1/ger;
		}
		my $server = delete $labels{server};
		if ($metric =~ /^statbuffer_/ && !$values{$metric})
		{
			is($server, $node->host . ':' . $node->port, "$metric has the server as a label");
		}
		$values{$metric}{ join '|', map { "$_=$labels{$_}" } sort keys %labels } = $value;
	}
	return ($response->{content}, \%types, \%values);
}

# What the view says, in the same form.
sub seen_in_view
{
	my %seen;

	foreach my $database ('postgres', 'app')
	{
		my $rows = decode_json($node->safe_psql($database, q{
			SELECT json_agg(json_build_object(
				'labels', format('buffer=%s|datname=%s|schemaname=%s', buffer, current_database(), schemaname),
				'statbuffer_failing', (state = 'failing')::int,
				'statbuffer_stopped', (state = 'stopped')::int,
				'statbuffer_worker', (pid IS NOT NULL)::int,
				'statbuffer_keys', keys,
				'statbuffer_pending', pending,
				'statbuffer_in_flight', in_flight,
				'statbuffer_memory_bytes', memory,
				'statbuffer_flush_lag_seconds', greatest(coalesce(extract(epoch FROM clock_timestamp() - oldest_due), 0), 0),
				'statbuffer_increments_total', increments,
				'statbuffer_flushed_keys_total', flushed_keys,
				'statbuffer_flushed', flushed_count,
				'statbuffer_handler_calls_total', handler_calls,
				'statbuffer_failures_total', failures,
				'statbuffer_discarded', discarded,
				'statbuffer_last_flush_timestamp_seconds', coalesce(extract(epoch FROM last_flush), 0),
				'statbuffer_last_error_timestamp_seconds', coalesce(extract(epoch FROM last_error_at), 0)))
			FROM sb_stat_buffers}));

		$seen{ delete $_->{labels} } = $_ foreach @$rows;
	}
	return \%seen;
}

# Scrapes, and compares all that is delivered of buffers with the view.  Only the
# lag grows by itself: it must be between what it was before and after.
sub compare
{
	my ($what) = @_;
	my $before = seen_in_view();
	my ($text, $types, $values) = scrape();
	my $after = seen_in_view();
	my (%expected, %got);

	foreach my $metric (keys %buffer_metrics)
	{
		foreach my $buffer (keys %$before)
		{
			$expected{"$metric\{$buffer}"} = 0 + $before->{$buffer}{$metric};
		}
		foreach my $buffer (keys %{ $values->{$metric} // {} })
		{
			my $value = 0 + $values->{$metric}{$buffer};

			if ($metric eq 'statbuffer_flush_lag_seconds')
			{
				my ($from, $to) = map { $_->{$buffer}{$metric} } $before, $after;

				$value = $from if $value >= $from && $value <= $to;
			}
			$got{"$metric\{$buffer}"} = $value;
		}
	}
	is_deeply(\%got, \%expected, "$what: each buffer's metrics are what the view says");
	return ($text, $types, $values);
}

my ($text, $types, $values) = compare('at first');

is_deeply({ map { $_ => $types->{$_} } grep { /^statbuffer_/ } keys %$types },
	{ %buffer_metrics, %server_metrics }, 'all metrics are there, of their types');
foreach my $trouble ('pg_exporter_last_scrape_error', 'pg_up')
{
	like($text, $trouble eq 'pg_up' ? qr/^pg_up(\{.*\})? 1$/m : qr/^$trouble(\{.*\})? 0$/m, "no trouble: $trouble");
}
like($text, qr/^pg_exporter_user_queries_load_error\{.*\} 0$/m, 'nor with the queries');

# That they are the same is not enough: they must be what was made above.
sub value
{
	my ($metric, $buffer) = @_;

	return $values->{"statbuffer_$metric"}{"buffer=$buffer|datname=postgres|schemaname=public"};
}
cmp_ok(value('pending', 'good'), '==', 7_000_000_000, 'what waits');
cmp_ok(value('flushed', 'good'), '==', 3, 'what is stored');
cmp_ok(value('increments_total', 'good'), '==', 3, 'how many increments that took');
cmp_ok(value('failing', 'failing'), '==', 1, 'which buffer fails');
cmp_ok(value('failures_total', 'failing'), '>', 0, 'how often');
cmp_ok(value('failing', 'good'), '==', 0, 'and which does not');
cmp_ok(value('stopped', 'stopped'), '==', 1, 'which is stopped');
cmp_ok(value('discarded', 'hasty'), '==', 6, 'what is discarded');
cmp_ok(value('in_flight', 'slow'), '==', 1, 'what is being stored');
cmp_ok(value('flush_lag_seconds', 'slow'), '>', 0, 'what is late');
cmp_ok(value('flush_lag_seconds', 'good'), '==', 0, 'and what is not');
cmp_ok(value('worker', 'unused'), '==', 0, 'a buffer that was never used has no worker');
cmp_ok($values->{statbuffer_pending}{'buffer=Odd "buffer\\|datname=app|schemaname=Odd "schema\\'}, '==', 4,
	'names are as the catalog has them');

# Of the server, both databases say the same, but of workers.
my %workers = map {
	$_ => $node->safe_psql('postgres', qq{
		SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND datname = '$_'})
} 'postgres', 'app';
foreach my $database ('postgres', 'app')
{
	my %server = map { $_ => 0 + ($values->{$_}{"datname=$database"} // -1) } keys %server_metrics;

	is_deeply(\%server, {
			statbuffer_server_launcher => 1,
			statbuffer_server_workers => 0 + $workers{$database},
			statbuffer_server_max_workers => 7,
			statbuffer_server_max_memory_bytes => 64 * 1024 * 1024
		}, "the server, seen from the database $database");
}

# --- as things go on --------------------------------------------------------

open_gate($gate);
wait_for_stored($node, 'postgres', 'slow', 3, 'what was late is stored');
$node->safe_psql('postgres', q{
	DELETE FROM failing_bad;
	SELECT sb_start('stopped');
	SELECT sb_stat_reset('hasty');
	SELECT sb_drain(relid) FROM sb_stat_buffers;
	DROP FOREIGN TABLE unused;
});
$node->append_conf('postgresql.conf', 'statbuffer.max_workers = 9');
$node->reload;
($text, $types, $values) = compare('later');
cmp_ok(value('pending', 'good'), '==', 0, 'nothing waits');
cmp_ok(value('flushed', 'good'), '==', 7_000_000_003, 'all is stored');
cmp_ok(value('failing', 'failing'), '==', 0, 'nothing fails');
cmp_ok(value('failures_total', 'failing'), '>', 0, 'though it did');
cmp_ok(value('stopped', 'stopped'), '==', 0, 'nothing is stopped');
cmp_ok(value('flush_lag_seconds', 'slow'), '==', 0, 'nothing is late');
cmp_ok(value('discarded', 'hasty'), '==', 0, 'statistics were reset');
ok(!defined value('keys', 'unused'), 'a buffer that is gone is not delivered');
cmp_ok($values->{statbuffer_server_max_workers}{'datname=postgres'}, '==', 9, 'settings are followed');

# --- who asks for the metrics -----------------------------------------------

my %known = (%buffer_metrics, %server_metrics);

# The metrics that an expression names.
sub metrics_of
{
	return $_[0] =~ /\b((?:statbuffer|pg_exporter)_\w+)/g;
}

sub only_known
{
	my ($where, @expressions) = @_;
	my %named = map { $_ => 1 } map { metrics_of($_) } @expressions;

	is_deeply([ grep { !$types->{$_} } sort keys %named ], [], "$where asks for metrics that there are");
	return \%named;
}

my $dashboard = decode_json(slurp_file("$pages/statbuffer-dashboard.json"));
my @panels = @{ $dashboard->{panels} };
my @expressions = map { $_->{expr} } map { @{ $_->{targets} // [] } } @panels;

only_known('the dashboard', @expressions, map { ref $_->{query} ? $_->{query}{query} : $_->{query} // '' } @{ $dashboard->{templating}{list} });
like($dashboard->{uid}, qr/^[\w-]{1,40}$/, 'it has a name that Grafana accepts');
cmp_ok($dashboard->{schemaVersion}, '>=', 36, 'it is of the form that Grafana has had since 9');
ok(exists $dashboard->{id} && !defined $dashboard->{id}, 'it does not bring an id of its own');
is(scalar(keys %{ { map { $_->{id} => 1 } @panels } }), scalar(@panels), 'its panels have ids');
my %taken;
foreach my $panel (@panels)
{
	my $place = $panel->{gridPos};

	ok($panel->{title} && $panel->{type} && $panel->{description}, "panel $panel->{id} says what it is");
	cmp_ok($place->{x} + $place->{w}, '<=', 24, "$panel->{title}: is not too wide");
	foreach my $x ($place->{x} .. $place->{x} + $place->{w} - 1)
	{
		$taken{"$x,$_"}++ foreach $place->{y} .. $place->{y} + $place->{h} - 1;
	}
	my %targets = map { $_->{refId} => 1 } @{ $panel->{targets} };
	is(scalar(keys %targets), scalar(@{ $panel->{targets} }), "$panel->{title}: its queries have names");
	is($panel->{datasource}{uid}, '${datasource}', "$panel->{title}: asks the source that was chosen");
}
is_deeply([ grep { $taken{$_} > 1 } keys %taken ], [], 'no panel covers another one');

my $alerts = slurp_file("$pages/alerts.yaml");
my $alerted = only_known('alerts', $alerts =~ /^\s+expr: (.*?)^\s+(?:for|labels):/msg);
cmp_ok(scalar(keys %$alerted), '>', 5, 'and for several');

# The page for people names all of them.
my $page = slurp_file("$pages/../monitoring.md");
is_deeply([ grep { $page !~ /`\Q$_\E`/ } sort keys %known ], [], 'the page tells of every metric');

SKIP:
{
	skip 'promtool (of the package prometheus) is not installed', 4 if !$promtool;

	my $dir = PostgreSQL::Test::Utils::tempdir;
	my $ours = join("\n", grep { /^(# \w+ )?statbuffer_/ } split /\n/, $text) . "\n";

	# Its advice goes to standard error.
	IPC::Run::run([ $promtool, 'check', 'metrics' ], '<', \$ours, '>&', \my $advice);
	is($advice, '', 'promtool finds nothing wrong with the metrics');

	command_like([ $promtool, 'check', 'rules', "$pages/alerts.yaml" ], qr/SUCCESS/, 'nor with the alerts');
	command_like([ $promtool, 'test', 'rules', "$FindBin::RealBin/alerts.yaml" ], qr/SUCCESS/, 'which are raised when they should be');

	# what Grafana fills in
	my $rules = "groups:\n- name: dashboard\n  rules:\n";
	foreach my $number (0 .. $#expressions)
	{
		my $expression = $expressions[$number] =~ s/\$__rate_interval/5m/gr =~ s/\$\w+/.*/gr;
		$rules .= "  - record: panel:$number\n    expr: " . encode_json([$expression]) =~ s/^\[|\]$//gr . "\n";
	}
	append_to_file("$dir/rules.yaml", $rules);
	command_like([ $promtool, 'check', 'rules', "$dir/rules.yaml" ], qr/SUCCESS/, 'and the dashboard asks in its language');
}

$exporter->kill_kill;
undef $exporter;
unlike(slurp_file($log), qr/level=(warn|error)/, 'the exporter had nothing to complain of');
$node->stop;

done_testing();
